"""Figures inside the budget: what one unit moves, their noise, who pays, and that they are true."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from fedtorch import Client, Local, Recipe, Server, Uniform, evaluate
from fedtorch.engines import messages
from fedtorch.privacy import (
    AdaptiveClip,
    Bands,
    ClientLevel,
    DistributedDP,
    LocalDP,
    SampleLevel,
    base,
    told,
)
from fedtorch.privacy import run as run_module
from fedtorch.privacy.accounting.events import Event, epsilon
from fedtorch.privacy.accounting.gaussian import gaussian_epsilon
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.noise.streams import Stream
from fedtorch.run import report
from fedtorch.secure.aggregator import Secure
from fedtorch.sites.ledgers import OverBudget, SiteLedgers
from fedtorch.sites.reports import expected
from fedtorch.strategies import FedPer
from fedtorch.training.losses import accuracy, cross_entropy
from fedtorch.types import TOLD, ConfigError, Task
from private_case import clients, model

EPSILON = {"epsilon": 8.0, "metrics_epsilon": 0.3, "metrics_every": 2}
PLANS = {
    "sample": SampleLevel(steps=2, **EPSILON),
    "client": ClientLevel(**EPSILON),
    "part": ClientLevel(rate=0.5, **EPSILON),
    "capped": ClientLevel(weight_cap=12, **EPSILON),
    "local": LocalDP(**EPSILON),
    "laplace": LocalDP(mechanism="laplace", **EPSILON),
    "distributed": DistributedDP(
        clients=9, shares=7, coordinates=50, resolution=2.0**14, **EPSILON
    ),
}
ALL = pytest.mark.parametrize("name", PLANS)


def plan_of(name: str, rounds: int = 4):
    return PLANS[name].planned_for(rounds)


def task_of(plan, **given) -> Task:
    noise = plan.calibrated(plan.rounds)
    numbers = {
        "clip": plan.clip,
        "noise": noise,
        "figures": told.figures_noise(plan, plan.rounds),
    } | given
    return Task({}, {}, 1, 0, 1.0, numbers)


def quiet(monkeypatch) -> None:
    """No noise anywhere: what is left is what one unit moves."""
    still = Stream(lambda n, scratch: torch.zeros(n, dtype=torch.int64).numpy().view("uint64"))
    monkeypatch.setattr(base, "stream", lambda *a: still)
    monkeypatch.setattr(Stream, "normal", lambda self, shape: torch.zeros(shape).double())
    monkeypatch.setattr(Stream, "uniform", lambda self, n: torch.full((n,), 0.5).double())
    zero = type("Zero", (), {"error": 0.0, "draw": lambda self, n, words: 0})()
    monkeypatch.setattr(DistributedDP, "table", lambda self, noise: zero)


CORNERS = [
    torch.tensor([[a, b, c]]).double()
    for a in (0.5,)
    for b in (-0.5, 0.0, 0.5)
    for c in (-0.5, 0.1, 0.5)
]
WILD = [torch.full((1, 3), v, dtype=torch.float64) for v in (math.nan, math.inf, -7.0, 1e100)]


def longest(plan, monkeypatch) -> float:
    """How far one unit moves what is sent, in the norm of the mechanism, over what noise is made for."""
    quiet(monkeypatch)
    task, others = task_of(plan), torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    if plan.unit == "example":
        without = plan.tell(others, task, "a")
        moved = [plan.tell(torch.cat([others, x]), task, "a") - without for x in CORNERS + WILD]
        return max(float(m.norm()) for m in moved) * plan._expected / plan.metrics_norm
    order = 1 if getattr(plan, "mechanism", "") == "laplace" else 2
    norms = []
    for size in (0.0, 1e-3, 1.0, 1e6):
        for data in [*CORNERS, *WILD, torch.cat(CORNERS)]:
            delta = torch.zeros(1, 40).double()
            delta[0, 0] = size
            sent = {
                "delta": {"w": delta},
                TOLD: {"sum": plan.tell(data.repeat(20, 1), task, "a")[None]},
            }
            out = plan.client(sent, torch.tensor([20.0]), task, ["a"])
            flat = torch.cat([v.flatten() for s in out.values() for v in s.values()])
            norms.append(float(flat.norm(p=order)) / plan.clip)
    return max(norms)


@ALL
def test_one_unit_moves_figures_and_update_together_by_no_more_than_noise_is_made_for(
    name, monkeypatch
):
    # the grid of the distributed plan rounds to its steps, which its own bound accounts for
    assert longest(plan_of(name), monkeypatch) <= 1 + (1e-3 if name == "distributed" else 1e-6)


@pytest.mark.parametrize("name", ["sample", "client", "part", "capped"])
def test_figures_that_nobody_bounds_are_noticed(name, monkeypatch):
    """Other plans clip all of a client's numbers once more."""
    monkeypatch.setattr(told, "bounded", lambda rows, norm: rows.clip(-1e3, 1e3))
    monkeypatch.setattr(told, "room", lambda plan, task: task.privacy["clip"])
    with pytest.raises(AssertionError):
        assert longest(plan_of(name), monkeypatch) <= 1.001


def deviation(plan, draws: int = 1000) -> float:
    """Of the noise on one client's figures, over what is claimed for it."""
    task = task_of(plan)
    nothing = torch.zeros(0, 3)
    seen = torch.stack([plan.tell(nothing, task, "a") for _ in range(draws)])
    return float(seen.std()) * plan._expected / (task.privacy["figures"] * plan.metrics_norm)


def test_noise_of_figures_has_the_claimed_size_and_is_never_drawn_twice(monkeypatch):
    plan = plan_of("sample")
    assert deviation(plan) == pytest.approx(1, abs=0.1)
    seeded = replace(plan, insecure_seed=3)
    task, some = task_of(plan), torch.zeros(2, 3)
    places = [
        (task, "a"),
        (task, "b"),
        (replace(task, round=3), "a"),
        (replace(task, visit=1), "a"),
    ]
    seen = [tuple(seeded.tell(some, t, i).tolist()) for t, i in places]
    assert len(set(seen)) == 4 and seeded.tell(some, task, "a").tolist() == list(seen[0])
    steps = seeded.stream("noise", *task.draw, "a").normal((3,))
    own = torch.tensor(seen[0]).double() * plan._expected
    assert not torch.allclose(own / own.norm(), steps / steps.norm(), atol=1e-3)
    # planted: noise without its factor
    monkeypatch.setattr(SampleLevel, "metrics_norm", 1e-3, raising=False)
    with pytest.raises(AssertionError):
        std = deviation(plan) * plan.metrics_norm / told.norm(counts=True)
        assert std == pytest.approx(1, abs=0.1)


@ALL
def test_training_and_figures_together_cost_what_was_asked_for(name):
    plan = plan_of(name, 6)
    noise, figures = plan.calibrated(6), told.figures_noise(plan, 6)
    whole = plan.whole(noise, 6, figures)
    assert 7.95 < plan.price(whole) <= 8.0
    assert plan.planned(noise, 6) == plan.price(whole)
    if name == "sample":
        assert whole[1] == Event("gaussian", figures, 1.0, 3)
        assert epsilon(whole[:1], plan.delta) == pytest.approx(7.7, abs=0.01)
        return
    # one event a round has both: what is left for the update alone is cheaper by so much
    assert len(whole) == 1 and figures > noise
    less = plan.event(noise / plan.rest(noise / figures))
    alone = plan.price([replace(less, steps=3), replace(plan.event(noise), steps=3)])
    assert plan.price(whole) - alone == pytest.approx(0.3, rel=0.03)


def test_figures_of_whole_data_are_composed_tightly_and_without_amplification():
    plan = SampleLevel(
        noise_multiplier=2.0,
        sample_rate=1.0,
        steps=3,
        metrics_epsilon=0.5,
        metrics_every=1,
        rounds=4,
    )
    figures = told.figures_noise(plan, 4)
    exact = gaussian_epsilon(1 / math.sqrt(12 / 4 + 4 / figures**2), plan.delta)
    assert plan.planned(2.0, 4) == pytest.approx(exact, rel=1e-9)
    assert exact - gaussian_epsilon(2 / math.sqrt(12), plan.delta) == pytest.approx(0.5, rel=0.03)


def run_of(
    name: str, sizes=(9, 20, 14, 12), rounds: int = 4, solver: str = "auto", **given
) -> Server:
    plan = replace(PLANS[name].planned_for(rounds), **given.pop("plan", {}))
    recipe = Recipe(privacy=plan, aggregator=given.pop("aggregator", Recipe().aggregator))
    return Server(model(), clients(sizes), recipe, engine=Local(solver=solver), seed=1, **given)


@ALL
def test_every_released_figure_is_charged_before_it_is_made(name, monkeypatch):
    given = {"aggregator": Secure(width=32)} if name == "distributed" else {}
    plan = {"clients": None, "shares": None, "coordinates": None, "resolution": None}
    run = run_of(name, (9,) * 6, plan=plan if name == "distributed" else {}, **given)
    figures = [*run.rounds(9)]
    assert len(figures) == 4
    kinds = [e.event for e in run.private.ledger.entries]
    own = [e for e in kinds if e == Event("gaussian", run.private.metrics_noise or 0.0)]
    assert len(own) == (2 if name == "sample" else 0)  # others have one event a round for both
    assert len(kinds) - len(own) == 4 == report.statement(run.private)["rounds_charged"]
    assert run.private.spent() <= 8.0
    assert run.private.spent() == pytest.approx(run.private.figures()["privacy_epsilon_planned"])
    # planted: a round's figures are not charged
    monkeypatch.setattr(run_module.told, "due", lambda plan, round: False)
    short = run_of(name, (9,) * 6, plan=plan if name == "distributed" else {}, **given)
    short.round()
    assert [e.event for e in short.private.ledger.entries] == kinds[:1]


def judged(run: Server) -> dict[str, float]:
    """What figures of the next round should be, were there no noise."""
    x, y = zip(*(c.data.tensors for c in run.clients), strict=True)
    wanted = {"loss": lambda x, y: cross_entropy(x, y).clamp(max=5.0), "accuracy": accuracy}
    own = [evaluate(run.model, c.data.tensors, wanted) for c in run.clients]
    mean = {k: sum(o[k] for o in own) / len(own) for k in own[0]}
    pooled = evaluate(run.model, (torch.cat(x), torch.cat(y)), wanted)
    return pooled if run.recipe.privacy.unit == "example" else mean


@pytest.mark.parametrize(
    "name, solver",
    [*((name, "fast") for name in PLANS), ("client", "stacked"), ("sample", "general")],
)
def test_figures_are_those_of_the_model_as_it_was_sent(name, solver, monkeypatch):
    if name in ("distributed", "part"):
        given = {"aggregator": Secure(width=32)} if name == "distributed" else {}
        plan = {"rate": 1.0} if name == "part" else dict.fromkeys(
            ("clients", "shares", "coordinates", "resolution")
        )  # fmt: skip
    else:
        given, plan = {}, {}
    run = run_of(name, (9, 20, 14, 12, 11, 10), solver=solver, plan=plan, **given)
    run.round()
    true = judged(run)
    monkeypatch.setattr(Stream, "normal", lambda self, shape: torch.zeros(shape).double())
    monkeypatch.setattr(Stream, "uniform", lambda self, n: torch.full((n,), 0.5).double())
    if name == "distributed":
        zero = type("Zero", (), {"error": 0.0, "draw": lambda self, n, words: 0})()
        monkeypatch.setattr(DistributedDP, "table", lambda self, noise: zero)
    monkeypatch.setattr(run_module.PrivateRun, "told", _loud(run_module.PrivateRun.told))
    figures = run.round()
    if name != "capped":  # which weighs clients by their examples
        assert figures["noised_accuracy"] == pytest.approx(true["accuracy"], abs=1e-4)
        assert figures["noised_loss"] == pytest.approx(true["loss"], abs=1e-3)
    count = {"sample": 76.0, "capped": (9 + 11 + 10) / 12 + 3}.get(name, 6.0)
    assert figures.get("noised_count", 6.0) == pytest.approx(count, abs=1e-4)


def _loud(tell):
    """Figures are told however much noise is claimed for them: here there is none."""

    def loud(self, means, task, reported, scored):
        plan = self.plan
        object.__setattr__(self, "plan", copy.copy(plan))
        object.__setattr__(self.plan, "heard", lambda *a: (plan.heard(*a)[0], 1e-9))
        try:
            return tell(self, means, task, reported, scored)
        finally:
            self.plan = plan

    return loud


def test_every_engine_and_a_resumed_run_give_the_same_bits(tmp_path):
    plan = {"insecure_seed": 5, "strict": True}
    whole = run_of("sample", plan=plan)
    figures = [*whole.rounds(4)]
    first = run_of("sample", plan=plan)
    first.private.keep(Ledger(tmp_path / "ledger.jsonl"))
    assert [*first.rounds(3)] == figures[:3]
    saved = first.state_dict()
    second = run_of("sample", plan=plan)
    second.load_state_dict(
        saved, Ledger.resume(tmp_path / "ledger.jsonl", saved["privacy"]["ledger"])
    )
    assert second.round() == figures[3] and "noised_accuracy" in figures[3]
    without = Server(model(), clients((9, 20, 14, 12)), Recipe(privacy=SampleLevel(rounds=4)))
    with pytest.raises(ConfigError, match="do not agree on whether figures"):
        without.load_state_dict(whole.state_dict())


@pytest.mark.parametrize("none", [None, 0, 0.0])
def test_without_figures_nothing_is_sent_or_kept_for_them(none):
    plan = SampleLevel(steps=2, epsilon=8.0, metrics_epsilon=none, insecure_seed=1, rounds=2)
    run = Server(model(), clients((9, 20)), Recipe(privacy=plan), seed=1)
    figures = run.round()
    assert not [k for k in figures if k.startswith("noised")]
    assert plan.beside == {} and "metrics_noise" not in run.private.state_dict()
    usual = replace(plan, metrics_epsilon=None)
    assert plan.calibrated(2) == usual.calibrated(2) and plan.whole(1.0, 2, None) == usual.whole(
        1.0, 2, None
    )


def test_nothing_but_noised_sums_leaves_a_client():
    """A raw figure that somebody smuggles into a message has no place in it."""
    from fedtorch.training.local_update import local_update
    from fedtorch.training.module import snapshot

    run = run_of("sample", plan={"strict": True, "insecure_seed": 2})
    numbers = run.private.numbers(1)
    assert sorted(numbers) == ["clip", "figures", "noise"]
    task = Task(snapshot(run.model), {}, 1, 0, 1.0, numbers)
    update, _ = local_update(run.clients, task, run.recipe, model())
    assert set(update.metrics) == {"update_norm"} and set(update.sent) == {"delta", TOLD}
    other, _ = local_update(
        run.clients,
        task,
        replace(run.recipe, privacy=replace(run.recipe.privacy, insecure_seed=9)),
        model(),
    )
    like = {k: p.detach() for k, p in run.model.named_parameters()}
    messages.check(update, expected(run.recipe, like, run.model))  # as a server of sites does
    sent = messages.outcome_message(messages.Outcome(update, [], {}), update.ids)
    read = messages.read_outcome(sent, update.ids).update
    assert torch.equal(read.sent[TOLD]["sum"], update.sent[TOLD]["sum"])
    assert not bool((update.sent[TOLD]["sum"] == other.sent[TOLD]["sum"]).any())
    quiet_task = replace(task, privacy={k: numbers[k] for k in ("clip", "noise")})
    still, _ = local_update(run.clients, quiet_task, run.recipe, model())
    assert not still.sent[TOLD]["sum"].any()


@pytest.mark.parametrize(
    "given, why",
    [
        (lambda: SampleLevel(metrics_every=3), "there are none: give"),
        (lambda: SampleLevel(epsilon=1.0, metrics_epsilon=1.0), "leaves nothing of epsilon 1"),
        (lambda: SampleLevel(metrics_epsilon=-0.1), "metrics_epsilon must be"),
        (lambda: SampleLevel(metrics_epsilon=0.1, metrics_loss=0.0), "metrics_loss must be"),
        (
            lambda: ClientLevel(metrics_epsilon=0.1, adaptive=AdaptiveClip()),
            "adaptive and privacy.metr",
        ),
        (
            lambda: ClientLevel(metrics_epsilon=0.1, bands=Bands(count=2)),
            "bands and privacy.metrics",
        ),
        (
            lambda: told.figures_noise(SampleLevel(metrics_epsilon=0.1, metrics_every=9), 8),
            "more than the run's 8",
        ),
        (
            lambda: told._least(SampleLevel(metrics_epsilon=0.1), 8, 0.1, lambda z: 1.0),
            "is too little for 1 releases",
        ),
        (
            lambda: told.figures_noise(LocalDP(noise_multiplier=50.0, metrics_epsilon=4.0), 8),
            "is all that the run costs",
        ),
    ],
    ids=["every", "all", "negative", "loss", "adaptive", "bands", "rare", "little", "whole"],
)
def test_figures_that_cannot_be_are_refused(given, why):
    with pytest.raises(ConfigError, match=why):
        given()


class Mixing(torch.nn.Module):
    """In evaluation it looks at the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 4)

    def forward(self, x):
        y = self.inner(x)
        return y if self.training else y - y.mean(0)


def test_a_model_that_mixes_examples_in_evaluation_alone_is_refused():
    recipe = Recipe(privacy=SampleLevel(metrics_epsilon=0.3, rounds=4))
    with pytest.raises(ConfigError, match="in evaluation the model or its loss mixes"):
        Server(Mixing(), clients(), recipe)
    Server(Mixing(), clients(), Recipe(privacy=ClientLevel(metrics_epsilon=0.3, rounds=4)))


def test_parts_that_clients_keep_are_not_looked_at():
    recipe = Recipe(FedPer(personal=("2.*",)), privacy=ClientLevel(metrics_epsilon=0.3, rounds=4))
    with pytest.raises(ConfigError, match="leaves parts of it with them"):
        Server(model(), clients(), recipe)


def test_a_site_charges_both_or_neither_and_holds_a_task_to_the_plan(tmp_path):
    plan = plan_of("sample")
    noise, figures = plan.calibrated(4), told.figures_noise(plan, 4)
    right = {"clip": 1.0, "noise": noise}
    plan.hold(right, 0)
    plan.hold(right | {"figures": figures}, 1)
    for numbers, round in ((right, 1), (right | {"figures": figures}, 0)):
        with pytest.raises(ConfigError, match="must name"):
            plan.hold(numbers, round)
    with pytest.raises(ConfigError, match="multiplier of figures is"):
        plan.hold(right | {"figures": figures / 2}, 1)
    book = SiteLedgers(tmp_path, "north", 100.0, 1e-5)
    book.charge(plan, 0, noise)
    before = book.spent()
    book.charge(plan, 1, noise, figures)
    assert [e.event for e in book.ledgers["example"].entries][1:] == [
        plan.event(noise),
        Event("gaussian", figures),
    ]
    tight = (
        SiteLedgers(tmp_path / "other", "north", before, 1e-5)
        if (tmp_path / "other").mkdir() is None
        else None
    )
    with pytest.raises(OverBudget, match="would have cost"):
        tight.charge(plan, 0, noise, figures / 8)
    assert not len(tight.ledgers["example"])
    with pytest.raises(OverBudget, match="hides nothing"):
        book.charge(plan, 1, noise, 0.0)


def test_the_price_can_be_checked_by_hand(capsys):
    from fedtorch.__main__ import main

    plan = plan_of("sample", 6)
    noise, figures = plan.calibrated(6), told.figures_noise(plan, 6)
    words = ["epsilon", "--noise-multiplier", str(noise), "--sample-rate", "0.2", "--steps", "12"]
    assert main([*words, "--figures", "3", "--figures-noise", str(figures), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == plan.planned(noise, 6)
    assert main([*words, "--figures", "3"]) == 2
    assert "belong together" in capsys.readouterr().err


def test_who_stays_away_pays_for_no_figure():
    run = run_of("sample", (9,) * 6, participation=Uniform(cohort_size=2))
    [*run.rounds(4)]
    for entry in run.private.ledger.entries:
        assert entry.clients is not None and len(entry.clients) == 2
    assert run.private.spent() <= 8.0


def test_a_regression_has_a_loss_and_no_accuracy():
    g = torch.Generator().manual_seed(0)
    who = [
        Client(f"c{k}", (torch.randn(30, 6, generator=g), torch.randn(30, 1, generator=g)))
        for k in range(4)
    ]
    plan = SampleLevel(metrics_epsilon=4.0, rounds=1)
    run = Server(
        torch.nn.Linear(6, 1), who, Recipe(loss=torch.nn.MSELoss(reduction="none"), privacy=plan)
    )
    figures = run.round()
    assert {k for k in figures if k.startswith("noised")} == {"noised_loss", "noised_count"}
