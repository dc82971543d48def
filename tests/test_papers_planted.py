"""Mistakes that other implementations are known for, planted: each comes to the number worked out for it.

So the known answers of the other files tell the right algorithm from its usual misreadings.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from fedtorch import Local, Recipe, Server
from fedtorch.aggregation.robust import Median, near_median
from fedtorch.aggregation.rows import Robust
from fedtorch.aggregation.vectors import Bulyan, scores
from fedtorch.rounds.buffered import Buffered
from fedtorch.rounds.clock import Clock
from fedtorch.strategies import APFL, FedNova
from fedtorch.strategies.apfl import blend
from test_aggregation_robust import ends
from test_aggregation_vectors import ROWS, table
from test_papers import LR, STEPS, Scalar, quadratic
from test_papers_optimisation import SINGLE, WHOLE, clients, path


@dataclass(frozen=True, kw_only=True)
class Harmonic(FedNova):
    """The harmonic mean of |a_k| in the place of their mean: scales whose sum the mean divides by."""

    def numbers(self, ctx, norms):
        return {"reach": self.scale(ctx, norms)}

    def step(self, mean, extras, share):
        return {k: v / mean["numbers"]["reach"] for k, v in mean["delta"].items()}, extras


@dataclass(frozen=True, kw_only=True)
class Unchained(APFL):
    """v steps by the whole gradient at the mix, without the chain rule's alpha."""

    def train(self, solve, ctx):
        shared, w, v = solve(), ctx.anchor, ctx.memory["v"]
        alpha = ctx.memory["alpha"]["alpha"]
        for t in range(int(ctx.steps.max())):
            g, at_w = (ctx.data.grad(at, t)[0] for at in (blend(alpha, v, w), w))
            v, w = ({k: x[k] - ctx.lr * d[k] for k in x} for x, d in ((v, g), (w, at_w)))
        return shared, {"v": v, "alpha": {"alpha": alpha}}


@dataclass(frozen=True, kw_only=True)
class Early(Buffered):
    """Lateness counted after the version was raised, and 1 / (1 + sqrt(tau)) of it."""

    def step(self, flights, round, seed, draw, asked):
        step = super().step(flights, round, seed, draw, asked)
        late = [replace(d, factor=1 / (1 + (round + 1 - d.version) ** 0.5)) for d in step.due]
        return replace(step, due=late)


@dataclass(frozen=True, kw_only=True)
class AtOnce(Bulyan):
    """All that are chosen by one scoring, which the ones taken out before still take part in."""

    def merge(self, table):
        best = scores(table.points[:-1], self.f).argsort()[: len(table) - 2 * self.f]
        kept = table.each(lambda block: near_median(block[best], 2 * self.f))
        return kept, torch.ones(len(table))


@dataclass(frozen=True, kw_only=True)
class LowerMiddle(Robust):
    """torch.median of an even number of rows."""

    def across(self, rows):
        return rows.median(0).values


def test_fednova_with_a_harmonic_mean_of_steps():
    wrong = path(Harmonic(), 2, Local(chunk=2), **SINGLE)
    assert wrong == pytest.approx([0.468919, 0.453046], abs=6e-7)
    assert path(FedNova(), 2, Local(chunk=2), **SINGLE) == pytest.approx(
        [0.461149, 0.446059], abs=6e-7
    )


def test_apfl_without_the_chain_rules_alpha():
    recipe = Recipe(Unchained(weighting="uniform"), loss=quadratic, lr=0.1, **WHOLE)
    server = Server(Scalar(), clients(), recipe)
    for want in [(1.015850, -0.639850), (1.485436, -1.146904)]:
        server.round()
        memory = server.session.memory()
        assert [float(memory[i]["v"]["w"]) for i in "01"] == pytest.approx(want, abs=6e-7)


@pytest.mark.parametrize("kind, want", [(Early, -0.069925), (Buffered, -0.639850)])
def test_fedbuff_with_fresh_work_taken_for_late(kind, want):
    pace = kind(size=2, concurrency=2, clock=Clock(example=1 / STEPS))
    recipe = Recipe(loss=quadratic, lr=LR, steps=STEPS, batch_size=None)
    server = Server(Scalar(), clients(), recipe, pace=pace)
    server.round()
    assert float(server.model.w.detach()) == pytest.approx(want, abs=6e-7)


@pytest.mark.parametrize(
    "rule, want", [(AtOnce(), [0.983333, 2.05]), (Bulyan(), [1.05, 2.05])], ids=["once", "again"]
)
def test_bulyan_by_one_scoring(rule, want):
    assert rule.merge(table())[0]["w"].tolist() == pytest.approx(want, abs=6e-7)


@pytest.mark.parametrize(
    "rule, want",
    [(LowerMiddle(), [1.0, 2.0]), (Median(), [1.025, 2.025])],
    ids=["lower", "middle two"],
)
def test_the_median_of_an_even_number(rule, want):
    assert ends(ROWS[5::-1], rule) == pytest.approx(want, abs=6e-7)
