"""Rounds that wait, on a simulated clock: for all, or for the first of more than are needed."""

import pytest
import torch

from conftest import make_clients, mlp, weights
from fedtorch import ConfigError, Everyone, FedAvg, Local, Recipe, Scaffold, Server, TopK, Uniform
from fedtorch.privacy import ClientLevel, LocalDP, SampleLevel
from fedtorch.rounds.buffered import Buffered
from fedtorch.rounds.clock import Clock
from fedtorch.rounds.synchronous import OverSelected, Synchronous

SIZES = [9, 5, 12, 7, 8, 6]
SLOW = Clock(start=1.0, spread=0.8, jitter=0.3)


def served(pace, rounds=2, state=None, engine=Local(), **given):
    who = given.pop("participation", Everyone())
    recipe = Recipe(given.pop("strategy", FedAvg()), epochs=1, batch_size=8, **given)
    server = Server(
        mlp(), make_clients(SIZES), recipe, pace=pace, participation=who, seed=2, engine=engine
    )
    if state:
        server.load_state_dict(state)
    server.told = [*server.rounds(rounds)]
    server.close()
    return server


def alike(one, other):
    return all(torch.equal(v, weights(other.model)[k]) for k, v in weights(one.model).items())


def test_a_round_takes_as_long_as_its_slowest_client_and_trains_as_without_a_clock():
    """An example takes a second, so that the client of 12 is the last one every round."""
    timed, plain = served(Synchronous(clock=Clock())), served(Synchronous())
    assert [f["simulated_seconds"] for f in timed.told] == [12.0, 24.0]
    assert alike(timed, plain) and "simulated_seconds" not in plain.told[0]
    assert timed.told[1]["visits_min"] == timed.told[1]["visits_max"] == 2
    assert served(Synchronous(clock=Clock()), participation=Uniform(cohort_size=1)).told[0][
        "simulated_seconds"
    ] in map(float, SIZES)


def test_the_first_to_arrive_count_and_the_others_are_late():
    """Of six that take 5 to 12 seconds the first three count; the fourth would come after 8."""
    server = served(OverSelected(over=2, clock=Clock()), rounds=2)
    for figures in server.told:
        assert figures["cohort"] == ["c1", "c3", "c5"]
        assert figures["failed"] == {"c0": "late", "c2": "late", "c4": "late"}
    assert [f["simulated_seconds"] for f in server.told] == [7.0, 14.0]
    assert (server.told[1]["visits_min"], server.told[1]["visits_max"]) == (0, 2)
    # what counts is what those three would have made alone
    few = Server(
        mlp(), [c for c in make_clients(SIZES) if c.id in {"c1", "c3", "c5"}],
        Recipe(epochs=1, batch_size=8), seed=2,
    )  # fmt: skip
    few.fit(2, progress=False)
    assert all(
        torch.allclose(v, weights(few.model)[k], atol=1e-6)
        for k, v in weights(server.model).items()
    )


@pytest.mark.parametrize(
    "pace", [Synchronous(clock=SLOW), OverSelected(clock=SLOW)], ids=["synchronous", "over"]
)
@pytest.mark.parametrize("engine", [Local(solver="general"), Local(solver="fast")], ids=str)
def test_a_clock_goes_on_from_a_checkpoint_to_the_bit(pace, engine):
    whole, half = served(pace, 3, engine=engine), served(pace, 2, engine=engine)
    again = served(pace, 1, half.state_dict(), engine)
    assert alike(whole, again)
    for key in ("simulated_seconds", "visits_max", "cohort"):
        assert whole.told[2][key] == again.told[0][key]


def test_dropping_out_and_being_late_are_told_apart():
    who = Uniform(cohort_size=5, dropout=0.4)
    server = served(OverSelected(over=1.6, clock=Clock()), rounds=6, participation=who)
    kinds = {k for f in server.told for k in f["failed"].values()}
    assert kinds == {"dropped", "late"} and all(f["clients"] <= 3 for f in server.told)


def test_late_clients_are_charged_and_strategies_of_memory_go_on():
    plan = SampleLevel(noise_multiplier=1.0, rounds=2, steps=2, insecure_seed=1)
    server = served(OverSelected(over=2), privacy=plan)
    told = server.private.ledger.spent(plan.delta)
    assert told == pytest.approx(
        served(Synchronous(), privacy=plan).private.ledger.spent(plan.delta)
    )
    assert any("charged, whether it counts or not" in n for n in server.notes)
    assert served(OverSelected(over=2), strategy=Scaffold()).told[1]["step_norm"] > 0


def test_what_a_channel_saves_is_time_on_a_slow_line():
    clock = Clock(example=0, megabyte=1e6)
    size = 4 * sum(p.numel() for p in mlp().parameters())
    dense, sparse = (served(Synchronous(clock=clock), 1, channel=c) for c in ((), (TopK(),)))
    assert dense.told[0]["simulated_seconds"] == pytest.approx(2 * size)
    up = sparse.told[0]["bytes_up"] / len(SIZES)
    assert sparse.told[0]["simulated_seconds"] == pytest.approx(size + up)


@pytest.mark.parametrize(
    ("pace", "given", "why"),
    [
        (OverSelected(), {"privacy": ClientLevel(rounds=1)}, "voids the claim of client-level"),
        (OverSelected(), {"privacy": LocalDP(rounds=1, strict=True)}, "privacy.strict keeps"),
        (OverSelected(over=1.0), {}, "leaves none of 6 clients out"),
        (OverSelected(), {"participation": Uniform(cohort_size=1)}, "leaves none of 1 clients out"),
    ],
    ids=["client", "strict", "one", "few"],
)
def test_what_it_cannot_keep_is_refused_in_a_sentence(pace, given, why):
    with pytest.raises(ConfigError, match=why):
        served(pace, **given)
    with pytest.raises(ConfigError, match=r"pace\.over must be a number >= 1"):
        OverSelected(over=0.9)


def test_no_clock_is_begun_or_left_in_the_middle_of_a_run():
    plain, timed = served(Synchronous(), 1), served(Synchronous(clock=Clock()), 1)
    with pytest.raises(ConfigError, match="no clock has run so far"):
        served(Synchronous(clock=Clock()), 1, plain.state_dict())
    with pytest.raises(ConfigError, match="a clock has run from before"):
        served(Synchronous(), 1, timed.state_dict())
    away = served(Buffered(size=2, concurrency=4), 1)
    with pytest.raises(ConfigError, match="clients are under way"):
        served(Synchronous(clock=Clock()), 1, away.state_dict())
