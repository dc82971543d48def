"""Some numbers of an update: the largest with their places, or those of a common draw."""

import pytest
import torch

from fedtorch import RandomK, TopK
from fedtorch.channel.base import Turn
from fedtorch.channel.vectors import packed, places, uniforms, unpacked

MANY = {"w": torch.arange(1.0, 21).double().expand(3, 20), "v": torch.zeros(3, 2, 2).double()}
LIKE = {k: v[0] for k, v in MANY.items()}


def test_all_clients_of_a_round_send_the_same_places_and_no_place_is_sent():
    stage = RandomK(share=0.25)
    code = stage.coded(MANY, Turn(5, (1, 2, 3)))
    assert list(code) == ["value"] and code["value"].shape == (3, 6)
    assert code["value"].dtype == torch.float32
    back = stage.decoded(code, LIKE, Turn(5))
    assert torch.equal(back["w"][0], back["w"][2]) and int((back["w"][0] != 0).sum()) <= 6
    # what is sent counts d/k times
    sent = back["w"][0] != 0
    assert torch.allclose(back["w"][0][sent], MANY["w"][0][sent] * 4)


def test_codes_of_one_draw_add_up():
    stage, sent = RandomK(share=0.5), {"w": torch.randn(4, 30).double()}
    turn, weight = Turn(9, (0, 1, 2, 3)), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    each = stage.decoded(stage.coded(sent, turn), {"w": sent["w"][0]}, turn)["w"]
    mean = {"w": (weight @ sent["w"])[None]}
    once = stage.decoded(stage.coded(mean, turn), {"w": sent["w"][0]}, turn)["w"]
    assert torch.allclose(once[0], weight @ each, atol=1e-6)


def test_the_draw_is_right_on_average_and_with_feedback_what_is_sent_is_as_it_was():
    stage, total = RandomK(share=0.2), torch.zeros(20).double()
    for seed in range(600):
        total += stage.decoded(stage.coded(MANY, Turn(seed)), LIKE, Turn(seed))["w"][0]
    assert torch.allclose(total / 600, MANY["w"][0], rtol=0.3)
    kept = RandomK(share=0.2, feedback=True)
    back = kept.decoded(kept.coded(MANY, Turn(1)), LIKE, Turn(1))["w"][0]
    assert torch.equal(back[back != 0], MANY["w"][0][back != 0])


def test_every_set_of_places_is_as_likely():
    """All 10 pairs of 5, and all 10 threes, about 200 times each of 2,000."""
    for count in (2, 3):
        found: dict[tuple[int, ...], int] = {}
        for seed in range(2000):
            drawn = tuple(places(seed * 7919, 5, count).tolist())
            found[drawn] = found.get(drawn, 0) + 1
        assert len(found) == 10 and all(len(set(p)) == count for p in found)
        assert all(140 < n < 260 for n in found.values())
    assert places(3, 5, 5).tolist() == [0, 1, 2, 3, 4]


def test_places_are_the_first_that_differ_of_the_draws_in_order():
    for seed, numbers, count in ((3, 50, 20), (4, 1000, 90), (5, 7, 3)):
        drawn = [int(u * numbers) for u in uniforms(seed, 9 * numbers)]
        assert places(seed, numbers, count).tolist() == sorted([*dict.fromkeys(drawn)][:count])


def test_draws_are_the_same_on_every_machine():
    """SplitMix64 from seed 0: its published first outputs, as shares of 2^64."""
    first = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert uniforms(0, 3).tolist() == [(n >> 11) * 2.0**-53 for n in first]


@pytest.mark.parametrize("bits", [1, 3, 8, 13])
def test_whole_numbers_take_as_many_bits_as_they_need(bits):
    values = torch.arange(21).repeat(2, 1) % (1 << bits)
    code = packed(values, bits)
    assert code.shape == (2, -(-21 * bits // 8)) and code.dtype == torch.uint8
    assert torch.equal(unpacked(code, bits, 21), values)


@pytest.mark.parametrize(
    ("share", "size"), [(0.01, 10 * 10), (0.2, 1000)], ids=["places", "a bit for each number"]
)
def test_places_cost_the_less_of_two_ways_to_write_them(share, size):
    stage, sent = TopK(share=share), {"w": torch.randn(2, 1000).double()}
    code = stage.encode(sent)
    assert code["place"].shape == (2, -(-size // 8))
    back = stage.decode(code, {"w": sent["w"][0]})["w"]
    most = sent["w"].abs().topk(round(share * 1000), 1).indices.sort(1).values
    assert torch.equal(back.nonzero()[:, 1].view(2, -1), most)
    wrong = torch.full_like(code["place"], 255)
    with pytest.raises(ValueError, match="place"):
        stage.decode(code | {"place": wrong}, {"w": sent["w"][0]})
