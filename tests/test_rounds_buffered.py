"""FedBuff on a simulated clock: by hand, on every solver, under plans, and over a checkpoint."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import watched
from fedtorch import Client, FedAvg, FedPer, Local, Recipe, Scaffold, Server, Uniform
from fedtorch.aggregation.robust import Median
from fedtorch.engines import Processes
from fedtorch.privacy import ClientLevel, LocalDP, SampleLevel
from fedtorch.privacy.run import BudgetSpent
from fedtorch.rounds.buffered import Asynchronous, Buffered
from fedtorch.rounds.clock import Clock
from fedtorch.rounds.synchronous import Synchronous
from fedtorch.run import checkpoint, objects
from fedtorch.types import ConfigError
from tests.test_papers import LR, START, STEPS, A, B, N, Scalar, local, quadratic

CLOCK = Clock(start=2.0, spread=0.7, jitter=0.3, megabyte=5.0)
PACE = Buffered(size=3, concurrency=4, clock=CLOCK)


def clients(count=6):
    g = torch.Generator().manual_seed(0)
    return [
        Client(
            f"c{k}",
            (torch.randn(8 + k, 6, generator=g), torch.randint(0, 3, (8 + k,), generator=g)),
        )
        for k in range(count)
    ]


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3))


def trained(rounds, pace=PACE, engine=Local(), model=net, state=None, **options):
    recipe = Recipe(options.pop("strategy", FedAvg()), **{"lr": 0.1, "batch_size": 4} | options)
    server = Server(model(), clients(), recipe, pace=pace, engine=engine, seed=3)
    if state:
        server.load_state_dict(state)
    figures = [*server.rounds(rounds)]
    server.close()
    return server, figures


def worst(a, b):
    return max(
        float((a._weights.copied()[k] - v).abs().max()) for k, v in b._weights.copied().items()
    )


@pytest.mark.parametrize("chunk", [1, 2])
def test_fedbuff_nguyen_2022_algorithm_1(chunk):
    two = [
        Client(str(k), (torch.zeros(N[k], 1), torch.tensor([[A[k], B[k]]] * N[k]).double()))
        for k in range(2)
    ]
    recipe = Recipe(loss=quadratic, lr=LR, steps=STEPS, batch_size=None)
    # a visit takes as many seconds as it has examples: client 0 is three times as slow
    pace = Buffered(size=2, concurrency=2, clock=Clock(example=1 / STEPS))
    server = Server(Scalar(), two, recipe, pace=pace, engine=Local(chunk=chunk))
    path = [(f, float(server.model.w.detach())) for f in server.rounds(3)]

    def change(k, w):
        return local(k, w) - w

    w0 = START
    w1 = w0 + (change(1, w0) + change(1, w0)) / 2  # at 1 s and 2 s
    w2 = w1 + (change(0, w0) / 2**0.5 + change(1, w1)) / 2  # both at 3 s, client 0 one step late
    w3 = w2 + (change(1, w2) + change(1, w2)) / 2  # at 4 s and 5 s
    assert [w for _, w in path] == pytest.approx([w1, w2, w3], abs=1e-12)
    assert [w1, w2, w3] == pytest.approx([-0.639850, -0.594308, -0.902593], abs=1e-6)
    told = [(f["simulated_seconds"], f["staleness_mean"], f["staleness_max"]) for f, _ in path]
    assert told == [(2.0, 0.0, 0.0), (3.0, 0.5, 1.0), (5.0, 0.0, 0.0)]
    assert [f["cohort"] for f, _ in path] == [["1", "1"], ["0", "1"], ["1", "1"]]


@pytest.mark.parametrize("chunk", [1, 2])
def test_fedasync_xie_2019_algorithm_1(chunk):
    """Arrivals c1, c1, then c0 two steps late: each mixes in its model, not its change."""
    two = [
        Client(str(k), (torch.zeros(N[k], 1), torch.tensor([[A[k], B[k]]] * N[k]).double()))
        for k in range(2)
    ]
    recipe = Recipe(loss=quadratic, lr=LR, steps=STEPS, batch_size=None)
    pace = Asynchronous(concurrency=2, clock=Clock(example=1 / STEPS))
    server = Server(Scalar(), two, recipe, pace=pace, engine=Local(chunk=chunk))
    path = [(f, float(server.model.w.detach())) for f in server.rounds(3)]
    w0 = START
    w1 = 0.4 * w0 + 0.6 * local(1, w0)
    w2 = 0.4 * w1 + 0.6 * local(1, w1)
    share = 0.6 / 3**0.5
    w3 = (1 - share) * w2 + share * local(0, w0)
    assert [w for _, w in path] == pytest.approx([w1, w2, w3], abs=1e-12)
    assert [w1, w2, w3] == pytest.approx([-0.183910, -0.555998, -0.011494], abs=1e-6)
    assert [f["cohort"] for f, _ in path] == [["1"], ["1"], ["0"]]
    assert [f["staleness_max"] for f, _ in path] == [0, 0, 2]
    assert (path[2][0]["visits_min"], path[2][0]["visits_max"]) == (1, 2)


def test_lateness_counts_as_the_paper_has_it():
    kept = lambda **o: [Asynchronous(**o)._kept(t) for t in (0, 4, 5, 7)]  # noqa: E731
    assert kept(staleness="constant") == [1, 1, 1, 1]
    assert kept() == pytest.approx([1, 5**-0.5, 6**-0.5, 8**-0.5])
    # not 1 / (a (tau - b + 1))
    assert kept(staleness="hinge", power=10.0, grace=4) == pytest.approx([1, 1, 1 / 11, 1 / 31])
    for wrong in ({"mixing": 0.0}, {"power": 0.0}, {"staleness": "none"}):
        with pytest.raises(ConfigError, match=f"pace.{next(iter(wrong))}"):
            Asynchronous(**wrong)


ASYNC = Asynchronous(concurrency=3, clock=CLOCK)


def test_fedasync_is_the_same_on_every_solver_and_over_a_checkpoint(tmp_path):
    def plain():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    one, told = trained(8, pace=ASYNC, model=plain, engine=Local(solver="general"))
    assert max(f["staleness_max"] for f in told) >= 2
    for engine in (Local(solver="fast"), Local(solver="stacked")):
        assert worst(one, trained(8, pace=ASYNC, model=plain, engine=engine)[0]) < 1e-6
    half, _ = trained(5, pace=ASYNC, model=plain, engine=Local(solver="general"))
    checkpoint.save(tmp_path, half.state_dict())
    engine = Local(solver="general")
    again, _ = trained(3, ASYNC, engine, plain, checkpoint.load(tmp_path))
    assert worst(one, again) == 0


def test_statistics_are_mixed_in_as_weights_are():
    def normed():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    pace = Asynchronous(mixing=0.5, concurrency=1, clock=Clock())
    server, _ = trained(1, pace=pace, model=normed, batch_size=None)
    every = Asynchronous(mixing=1.0, concurrency=1)
    whole, _ = trained(1, pace=every, model=normed, batch_size=None)
    for name, start in normed().state_dict().items():
        if "num_batches" not in name:
            middle = (start + whole._weights.copied()[name]) / 2
            assert torch.allclose(server._weights.copied()[name], middle, atol=1e-6), name


def test_solvers_and_engines_agree():
    plain = lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731

    def seeded():
        torch.manual_seed(1)
        return plain()

    one, figures = trained(6, model=seeded, engine=Local(solver="general"))
    assert max(f["staleness_max"] for f in figures) >= 1
    for engine in (
        Local(solver="fast"),
        Local(solver="stacked", chunk=3),
        Processes(workers=1, solver="general"),
    ):
        other, told = trained(6, model=seeded, engine=engine)
        assert worst(one, other) < 1e-6
        assert [f["simulated_seconds"] for f in told] == [f["simulated_seconds"] for f in figures]


@pytest.mark.parametrize("strategy", [FedAvg(), FedPer(personal=("3.*",))], ids=str)
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(tmp_path, strategy):
    whole, told = trained(6, strategy=strategy)
    half, first = trained(3, strategy=strategy)
    checkpoint.save(tmp_path, half.state_dict())
    saved = checkpoint.load(tmp_path)
    again, last = trained(3, strategy=strategy, state=saved)
    assert worst(whole, again) == 0
    for key in ("simulated_seconds", "staleness_mean", "train_loss", "cohort", "bytes_down"):
        assert [f[key] for f in told] == [f[key] for f in first + last]
    with pytest.raises(ConfigError, match="go on with the pace"):
        trained(1, pace=Synchronous(), strategy=strategy, state=saved)


def test_two_visits_of_a_client_to_one_model_share_no_draw():
    # one client, asked again and again: each visit shuffles, drops out and rounds anew
    pace = Buffered(size=2, concurrency=1, clock=Clock())
    server = Server(net(), clients(1), Recipe(lr=0.1, batch_size=4), pace=pace)
    sent = watched(server)
    server.round()
    assert len(sent) == 2 and not torch.equal(*(u.sent["delta"]["0.weight"] for u in sent[:2]))


def test_every_visit_is_charged_as_it_begins_and_noised_by_itself():
    plan = SampleLevel(noise_multiplier=1.0, rounds=4, steps=2, insecure_seed=5)
    pace = Buffered(size=2, concurrency=1, clock=Clock())
    server = Server(net(), clients(1), Recipe(privacy=plan), pace=pace)
    sent = watched(server)
    figures = [*server.rounds(2)]
    assert len(server.private.ledger) == 4
    assert any("more may be spent than was planned" in n for n in server.notes)
    assert server.private.ledger.spent(plan.delta) == pytest.approx(plan.planned(1.0, 4))
    assert not torch.equal(*(u.sent["delta"]["0.weight"] for u in sent[:2]))
    assert figures[0]["nonprivate_simulated_seconds"] < figures[1]["nonprivate_simulated_seconds"]
    # with a target, the budget ends the run before a visit that it does not pay for
    paid = SampleLevel(epsilon=4.0, rounds=3, steps=2, insecure_seed=5)
    server = Server(net(), clients(1), Recipe(privacy=paid), pace=pace)
    assert len([*server.rounds(9)]) == 1
    assert len(server.private.ledger) == 2 and server.private.ledger.spent(paid.delta) <= 4.0
    assert not server.within_budget()  # of two visits of one client it could pay for the first
    with pytest.raises(BudgetSpent, match="round 2 would spend more"):
        server.round()
    assert len(server.private.ledger) == 2
    local_dp = LocalDP(epsilon=50.0, rounds=4, insecure_seed=5)
    server = Server(net(), clients(), Recipe(privacy=local_dp), pace=PACE)
    assert len([*server.rounds(2)]) == 2


@pytest.mark.parametrize(
    "options, pace, why",
    [
        ({"privacy": ClientLevel(rounds=1)}, PACE, "voids the claim of client-level privacy"),
        (
            {"privacy": LocalDP(rounds=1, strict=True)},
            PACE,
            "privacy.strict keeps to itself how many",
        ),
        ({"strategy": Scaffold()}, PACE, "scaffold also needs c"),
        ({"aggregator": Median()}, PACE, "needs the aggregator mean"),
        ({}, replace(PACE, concurrency=7), "more than the 6 clients there are: use 6 or fewer"),
    ],
)
def test_what_it_cannot_keep_is_refused_in_a_sentence(options, pace, why):
    recipe = Recipe(options.pop("strategy", FedAvg()), **options)
    with pytest.raises(ConfigError, match=why):
        Server(net(), clients(), recipe, pace=pace)


@pytest.mark.parametrize(
    "weighting, words", [("auto", "alike, as in FedBuff"), ("examples", "by their")]
)
def test_clients_count_alike_unless_asked_and_no_more_are_under_way_than_there_are(
    weighting, words
):
    server = Server(net(), clients(3), Recipe(FedAvg(weighting=weighting)), pace=Buffered(size=2))
    assert f"pace buffered: 3 clients are under way at any time, and count {words}" in "".join(
        server.notes
    )
    sent = watched(server)
    server.round()
    assert len({float(w) for u in sent for w in u.weight}) == (1 if weighting == "auto" else 2)
    # the third not asked as yet
    assert len(server.state_dict()["pace"]["flights"]["under_way"]) == 2


def test_the_pace_says_who_takes_part():
    with pytest.raises(ConfigError, match="leave participation out"):
        Server(net(), clients(), pace=PACE, participation=Uniform(cohort_size=2))
    for wrong in ({"size": 0}, {"concurrency": 0}, {"staleness": -1.0}):
        with pytest.raises(ConfigError, match=f"pace.{next(iter(wrong))}"):
            Buffered(**wrong)


def test_speeds_stay_and_visits_vary():
    clock = Clock(start=1.0, example=0.5, megabyte=2.0)
    assert clock.seconds(0, 0, 4, 3_000_000, 9) == 1 + 2 + 6
    fast = [replace(clock, spread=1.0).seconds(k, v, 4, 0, 9) for k in (0, 1) for v in (0, 1)]
    assert fast[0] == fast[1] != fast[2] == fast[3]
    drawn = [replace(clock, jitter=1.0).seconds(0, v, 4, 0, 9) for v in range(200)]
    assert min(drawn) >= 3 and 3 * 1.6 < sum(drawn) / 200 < 3 * 2.0


def test_options_of_the_command_line():
    made = objects.choose("pace", {"name": "buffered", "size": "5", "clock": {"spread": "0.5"}})
    assert made == Buffered(size=5, clock=Clock(spread=0.5))
    late = objects.choose("pace", {"name": "asynchronous", "mixing": "0.3", "staleness": "hinge"})
    assert late == Asynchronous(mixing=0.3, staleness="hinge")
    assert objects.choose("pace", {"clock": {"spread": "1"}}) == Synchronous(clock=Clock(spread=1))
    assert objects.choose("pace", objects._entry(made)) == made
