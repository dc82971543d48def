"""Few bits for a number: levels of a norm by chance, signs of one size."""

import pytest
import torch

from fedtorch import QSGD, ConfigError, Sign
from fedtorch.channel.base import Turn, decode, encode
from fedtorch.types import Released

VECTOR = {"w": torch.tensor([[3.0, -1.0, 0.5, 2.0]], dtype=torch.float64)}
LIKE = {"w": torch.zeros(4)}
PLAIN = dict(levels=4, bucket=None)


def coded(stage, sent, seed=1):
    turn = Turn(0, tuple(range(seed, seed + len(next(iter(sent.values()))))))
    code = stage.coded(sent, turn)
    like = {k: v[0] for k, v in sent.items()}
    return code, stage.decoded(code, like, Turn(0))


def test_levels_of_four_numbers_by_hand():
    """Norm 3.774917; a number lies between the levels around 3.178878, 1.059626, .529813 and 2.119252."""
    code, back = coded(QSGD(**PLAIN), VECTOR)
    assert code["norm"].dtype == torch.float32
    assert float(code["norm"]) == pytest.approx(3.774917, abs=1e-6)
    level = back["w"] * 4 / code["norm"].double()
    exact = torch.tensor([3.178878, -1.059626, 0.529813, 2.119252], dtype=torch.float64)
    assert torch.allclose(level, level.round()) and bool(((level - exact).abs() < 1).all())
    # 9 levels in 4 bits each, and the norm
    assert code["level"].shape == (1, 2) and code["level"].dtype == torch.uint8


def test_signs_of_one_size_and_what_they_leave_out_by_hand():
    """|p|_1 / d is 1.625, then .7625 of (.2, -1.5, 1, .1) with what the first code left out."""
    second, like = torch.tensor([0.2, -1.5, 1.0, 0.1], dtype=torch.float64), {"delta": LIKE}
    found, left = [], {}
    for values in (VECTOR["w"][0], second):
        sent = {"delta": {"w": values[None]}}
        update = Released.received(("only",), sent, {}, torch.ones(1))
        code, (left,) = encode((Sign(),), update, ["delta"], [left])
        found.append(decode((Sign(),), code, like).sent["delta"]["w"][0].tolist())
    assert found[0] == [1.625, -1.625, 1.625, 1.625]
    assert found[1] == pytest.approx([0.7625, -0.7625, -0.7625, 0.7625], abs=1e-7)


def test_rounding_is_right_on_average_and_varies_no_more_than_the_paper_says():
    many = {"w": VECTOR["w"].expand(4000, 4)}
    _, back = coded(QSGD(**PLAIN), many)
    error = back["w"].mean(0) - VECTOR["w"][0]
    excess = (back["w"] - many["w"]).square().sum(1).mean() / VECTOR["w"].square().sum()
    assert float(error.abs().max()) < 0.03  # five deviations of a mean of 4,000
    assert 0 < float(excess) < min(4 / 4**2, 4**0.5 / 4)


def test_zeros_stay_zeros_and_each_bucket_has_a_norm_of_its_own():
    sent = {"a": torch.zeros(2, 3, 5, dtype=torch.float64), "b": torch.ones(2, 4).double()}
    code, back = coded(QSGD(levels=1, bucket=8), sent)
    assert code["norm"].shape == (2, 3) and code["level"].shape == (2, -(-19 * 2 // 8))
    assert not back["a"].any() and not code["norm"][:, 0].any()
    one, whole = coded(QSGD(levels=7, bucket=1), sent)
    assert one["norm"].shape == (2, 19) and torch.equal(whole["b"], sent["b"])


def test_two_clients_and_two_visits_round_by_draws_of_their_own():
    sent = {"w": torch.rand(2, 500, dtype=torch.float64)[:1].expand(2, 500)}
    code, _ = coded(QSGD(), sent)
    again, _ = coded(QSGD(), sent)
    other, _ = coded(QSGD(), sent, seed=7)
    assert torch.equal(code["level"], again["level"])
    assert not torch.equal(code["level"][0], code["level"][1])
    assert not torch.equal(code["level"][0], other["level"][0])


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        (QSGD(**PLAIN), {"level": torch.full((1, 2), 255, dtype=torch.uint8)}),
        (QSGD(**PLAIN), {"level": torch.zeros(1, 3, dtype=torch.uint8)}),
        (QSGD(**PLAIN), {"norm": -torch.ones(1, 1)}),
        (Sign(), {"size": -torch.ones(1, 1)}),
        (Sign(), {"plus": torch.zeros(1, 1)}),
    ],
    ids=["level", "length", "norm", "size", "type"],
)
def test_a_code_that_nobody_makes_is_refused(stage, change):
    code = stage.coded(VECTOR, Turn(0, (0,)))
    with pytest.raises(ValueError):
        stage.decoded(code | change, LIKE, Turn())


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ConfigError, match=r"channel\.levels must be at least 1"):
        QSGD(levels=0)
    with pytest.raises(ConfigError, match="at most 32768"):
        QSGD(levels=1 << 16)
    with pytest.raises(ConfigError, match="feedback is not for qsgd"):
        QSGD(feedback=True)
