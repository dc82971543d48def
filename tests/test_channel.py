"""What goes through a channel, by hand; and the same on every engine, and when a run goes on."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from conftest import make_clients, mlp, watched, weights
from fedtorch import (
    QSGD,
    Client,
    ConfigError,
    FedProx,
    Local,
    Median,
    PowerSGD,
    RandomK,
    Recipe,
    Server,
    Sign,
    Stage,
    TopK,
)
from fedtorch.channel.base import UNSENT, Turn, decode, encode, size
from fedtorch.privacy import AdaptiveClip, ClientLevel, LocalDP, SampleLevel
from fedtorch.types import Released

UPDATES = [(3.0, -1.0, 0.5, 2.0), (0.2, -1.5, 1.0, 0.1)]


def released(values: tuple[float, ...]) -> Released:
    """Four numbers in two tensors, as one client sends them."""
    flat = torch.tensor([values], dtype=torch.float64)
    sent = {"delta": {"a": flat[:, :1], "b": flat[:, 1:].reshape(1, 3, 1)}}
    return Released.received(("only",), sent, {}, torch.ones(1))


def numbers(tree: dict[str, Tensor]) -> list[float]:
    return [round(float(x), 6) for name in ("a", "b") for x in tree[name].flatten()]


def test_the_largest_number_is_sent_and_the_rest_is_kept_for_later():
    """By hand: the second update is sent with what the first left out, (.2, -2.5, 1.5, 2.1)."""
    channel, found, left = (TopK(share=0.25),), [], {}
    for values in UPDATES:
        update = released(values)
        like = {"delta": {k: v[0] for k, v in update.sent["delta"].items()}}
        code, (left,) = encode(channel, update, ["delta"], [left])
        assert size(code, channel, like) == 5 and code.sent["delta"]["value"].dtype == torch.float32
        found.append(numbers(decode(channel, code, like).sent["delta"]))
    assert found == [[3, 0, 0, 0], [0, -2.5, 0, 0]]
    assert numbers(left[UNSENT + "delta"]) == [0.2, 0, 1.5, 2.1]


def test_without_feedback_nothing_is_kept():
    channel = (TopK(share=0.5, feedback=False),)
    code, left = encode(channel, released(UPDATES[0]), ["delta"], [{}])
    place = code.sent["delta"]["place"]
    assert left == [{}] and place.dtype == torch.uint8 and place.tolist() == [[0b1100]]


def test_a_channel_of_no_stage_is_the_identity():
    whole = released(UPDATES[0])
    code, left = encode((), whole, ["delta"], [{}])
    assert code is whole and left == [{}] and decode((), code, {"delta": {}}) is whole


def test_shares_are_rounded_and_a_value_is_never_longer_for_it():
    many = {"w": torch.randn(50, 100, dtype=torch.float64)}
    assert TopK(share=0.29).encode(many)["value"].shape == (50, 29)
    assert TopK(share=1e-9).encode(many)["value"].shape == (50, 1)
    code = TopK(share=1.0).encode(many)
    kept = TopK(share=1.0).decode(code, {"w": many["w"][0]})["w"]
    assert bool((kept.abs() <= many["w"].abs()).all()) and torch.allclose(
        kept, many["w"], rtol=1e-6
    )


def test_only_what_is_released_is_encoded():
    with pytest.raises(TypeError, match="for what is released"):
        encode((TopK(),), {"delta": {}}, ["delta"], [{}])


def test_what_is_no_stage_and_what_is_no_share_is_refused():
    with pytest.raises(ConfigError, match="each stage of channel must be a Stage"):
        Recipe(channel=("topk",))
    with pytest.raises(ConfigError, match="channel must be"):
        Recipe(channel=TopK())
    with pytest.raises(ConfigError, match=r"channel.share must be in \(0, 1\]"):
        TopK(share=0.0)


def run(engine: object, rounds: int = 3, **given: object) -> Server:
    recipe = Recipe(epochs=1, batch_size=8, channel=(TopK(share=0.2),), **given)
    server = Server(mlp(), make_clients([9, 5, 12, 7, 8]), recipe, engine=engine, seed=2)
    server.last = [*server.rounds(rounds)][-1]
    return server


def test_every_solver_sends_the_same_and_bytes_are_those_of_the_code():
    d = sum(p.numel() for p in mlp().parameters())
    server = run(Local())
    sent = f"a client sends {server.last['bytes_up'] // 5} bytes a round in place of {4 * d}"
    assert any(sent in note for note in server.notes)
    found = []
    for engine in (
        Local(chunk=1, solver="general"),
        Local(chunk=2, solver="stacked"),
        Local(solver="fast"),
    ):
        server = run(engine)
        # a bit for each place is less than a place for each value
        assert server.last["bytes_up"] == 5 * (4 * round(0.2 * d) + -(-d // 8))
        found.append(weights(server.model))
    for other in found[1:]:
        assert all(torch.allclose(v, found[0][k], atol=1e-5) for k, v in other.items())


def test_a_run_that_goes_on_is_the_run_that_was_never_broken():
    whole, part = run(Local()), run(Local(), rounds=2)
    rest = run(Local(), rounds=1)
    rest.load_state_dict(part.state_dict())
    rest.round()
    assert all(torch.equal(v, weights(whole.model)[k]) for k, v in weights(rest.model).items())


class Line(nn.Module):
    """Three weights, drawn to a client's targets."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), 3)


def halves(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1) / 2


def line(feedback: bool, rounds: int) -> list[float]:
    client = Client("c", (torch.zeros(1, 1), torch.tensor([[8.0, 4.0, 2.0]], dtype=torch.float64)))
    stage = TopK(share=1 / 3, feedback=feedback)
    recipe = Recipe(loss=halves, lr=0.5, steps=1, batch_size=None, channel=(stage,))
    server = Server(Line(), [client], recipe)
    for _ in server.rounds(rounds):
        pass
    return server.model.w.tolist()


def test_rounds_with_feedback_by_hand():
    """Half of the way to (8, 4, 2) is sent, one number a round; what is left is added to the next.

    p1 = (4, 2, 1): 4 is sent. p2 = (2, 2 + 2, 1 + 1): 4 is sent, e = (2, 0, 2). p3 = (2 + 2, 0, 1 + 2): 4.
    """
    assert line(True, 1) == [4, 0, 0]
    assert line(True, 2) == [4, 4, 0]
    assert line(True, 3) == [8, 4, 0]
    # without: p2 = (2, 2, 1) ties, and either of the first two moves by 2; the third has to wait
    assert sum(line(False, 2)) == 6


@pytest.mark.parametrize(
    "plan",
    [
        SampleLevel(noise_multiplier=0.5, rounds=3, insecure_seed=1),
        LocalDP(noise_multiplier=0.1, rounds=3, insecure_seed=1, strict=True),
    ],
    ids=["sample", "local"],
)
def test_what_a_plan_has_noised_may_be_held_back_and_sent_later(plan):
    server = run(Local(), privacy=plan)
    assert server.private.spent() > 0
    assert all(UNSENT + "delta" in m for m in server.session.memory().values())


@dataclass(frozen=True, kw_only=True)
class Longer(Stage):
    """Says that no update comes out longer, and makes each nine times as long."""

    contracts: ClassVar[bool] = True
    feedback: bool = False

    def encode(self, sent):
        return sent

    def decode(self, code, like):
        return {name: 9 * v for name, v in code.items()}


@pytest.mark.parametrize("stage", [TopK(feedback=False), Longer()], ids=["topk", "longer"])
@pytest.mark.parametrize("adaptive", [None, AdaptiveClip(start=0.5)], ids=["fixed", "adaptive"])
def test_under_client_level_privacy_no_client_moves_the_sum_by_more_than_the_clip(adaptive, stage):
    plan = ClientLevel(clip=0.1, noise_multiplier=0.3, rounds=2, adaptive=adaptive, insecure_seed=1)
    recipe = Recipe(privacy=plan, channel=(stage,))
    server = Server(mlp(), make_clients([9, 5, 12, 7, 8]), recipe)
    seen = watched(server)
    server.round()
    norms = torch.cat(
        [sum(v.square().flatten(1).sum(1) for v in u.sent["delta"].values()) for u in seen]
    )
    clip = (0.5 if adaptive else 0.1) * (1 + 1e-12)
    assert len(norms) == 5 and bool((norms.sqrt() <= clip).all())
    assert server.session.memory() == {}


def test_a_strategy_of_two_parts_and_a_median_get_what_was_decoded():
    server = run(Local(), strategy=FedProx(mu=0.1), aggregator=Median())
    assert server.last["step_norm"] > 0


def test_a_client_left_out_keeps_what_it_had_not_sent():
    server = run(Local(solver="general"), rounds=1)
    before = server.session.memory()["c1"][UNSENT + "delta"]
    server.session.clients["c1"].data.tensors[0].fill_(torch.inf)
    figures = server.round()
    assert figures["failed"] == {"c1": "nonfinite"}
    assert server.session.memory()["c1"][UNSENT + "delta"] is before


STAGES = {
    "topk": (TopK(share=0.1),),
    "randk": (RandomK(share=0.2),),
    "randk kept": (RandomK(share=0.2, feedback=True),),
    "qsgd": (QSGD(levels=7),),
    "sign": (Sign(),),
    "powersgd": (PowerSGD(rank=1),),
    "topk, qsgd": (TopK(share=0.1), QSGD()),
    "topk, sign": (TopK(share=0.1), Sign()),
    "powersgd, topk, qsgd": (PowerSGD(rank=1), TopK(share=0.5), QSGD()),
}


@pytest.mark.parametrize("channel", STAGES.values(), ids=STAGES)
def test_every_channel_is_the_same_on_every_solver_and_over_a_checkpoint(channel):
    def served(engine, rounds=2):
        recipe = Recipe(epochs=1, batch_size=8, channel=channel)
        server = Server(mlp(), make_clients([9, 5, 12]), recipe, engine=engine, seed=4)
        server.last = [*server.rounds(rounds)]
        return server

    one, other = served(Local(chunk=1, solver="general")), served(Local(chunk=2, solver="stacked"))
    fast = served(Local(solver="fast"))
    up = one.last[-1]["bytes_up"]
    assert up == other.last[-1]["bytes_up"] == fast.last[-1]["bytes_up"]
    assert up < 3 * 4 * sum(p.numel() for p in mlp().parameters())
    first = weights(one.model)
    for found in (weights(other.model), weights(fast.model)):
        # a number near a border may fall on its other side where the last digits differ
        far = [float(((v - first[k]).abs() > 1e-5).double().mean()) for k, v in found.items()]
        assert max(far) < 0.1
    # a checkpoint holds what clients keep: as if never broken, to the bit
    part, rest = (
        served(Local(chunk=1, solver="general"), 1),
        served(Local(chunk=1, solver="general"), 0),
    )
    rest.load_state_dict(part.state_dict())
    rest.round()
    assert all(torch.equal(v, first[k]) for k, v in weights(rest.model).items())


def test_a_sum_will_do_where_codes_add_up():
    recipe = Recipe(channel=(RandomK(share=0.5),))
    assert not recipe.needs_rows
    assert Recipe(channel=(RandomK(share=0.5, feedback=True),)).needs_rows
    plan = ClientLevel(clip=0.1, noise_multiplier=0.3, rounds=2, insecure_seed=1)
    assert Recipe(privacy=plan, channel=(RandomK(share=0.5),)).needs_rows


def test_two_stages_leave_for_later_what_both_lose():
    """Of (3, -1, .5, 2) two are sent as signs of their mean size: 2.5, 2.5; .5, -1, .5, -.5 is left."""
    channel = (TopK(share=0.5), Sign())
    update = released(UPDATES[0])
    like = {"delta": {k: v[0] for k, v in update.sent["delta"].items()}}
    code, (left,) = encode(channel, update, ["delta"], [{}])
    assert sorted(code.sent["delta"]) == ["place", "then/plus", "then/size"]
    assert numbers(decode(channel, code, like).sent["delta"]) == [2.5, 0, 0, 2.5]
    assert numbers(left[UNSENT + "delta"]) == [0.5, -1, 0.5, -0.5]
    assert size(code, channel, like) == 1 + 1 + 4


def test_what_is_rounded_at_random_is_not_kept_but_what_the_first_stage_leaves_out_is():
    channel, turn = (TopK(share=0.5), QSGD(levels=1, bucket=None)), Turn(1, (2,))
    _, (left,) = encode(channel, released(UPDATES[0]), ["delta"], [{}], turn)
    assert numbers(left[UNSENT + "delta"]) == [0, -1, 0.5, 0]


def test_of_raw_updates_feedback_would_never_send_the_rest():
    """Must differ: what is left out is of the update with its past, not of the raw one."""
    channel, left = (TopK(share=0.25),), {}
    for values in UPDATES:
        _, (left,) = encode(channel, released(values), ["delta"], [left])
    raw = [0.2, 0, 1, 0.1]  # of the second update alone
    assert numbers(left[UNSENT + "delta"]) != raw


def test_a_visit_draws_other_numbers_than_the_last():
    recipe = Recipe(epochs=1, batch_size=8, channel=(QSGD(levels=1),))
    server = Server(mlp(), make_clients([9, 5]), recipe, seed=2)
    seen = []
    for _ in range(2):
        task = server._task()
        seen.append((Turn.of(task, ["c0", "c1"]), Turn.of(replace(task, visit=1), ["c0"])))
        server.round()
    (one, again), (two, _) = seen
    assert len({*one.own, *two.own, *again.own}) == 5 and len({one.common, two.common}) == 2


def test_one_of_your_own_has_both_halves():
    class Half(Stage):
        def encode(self, sent):
            return sent

    with pytest.raises(ConfigError, match="overrides neither decode nor decoded"):
        Half()

    class Drawn(Stage):
        def coded(self, sent, turn):
            return {"code": sent["w"] + turn.common}

        def decoded(self, code, like, turn):
            return {"w": code["code"] - turn.common}

    stage, sent = Drawn(), {"w": torch.ones(1, 2)}
    assert torch.equal(stage.decode(stage.encode(sent), sent)["w"], sent["w"])
