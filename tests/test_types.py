"""Nothing of a client's leaves it but what its plan released."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from conftest import make_clients, mlp
from fedtorch import FedAvg, Local, Observer, Recipe, Server
from fedtorch.privacy import ClientLevel, LocalDP, Nothing, SampleLevel
from fedtorch.privacy.base import Privacy
from fedtorch.training.asked import ClientsData
from fedtorch.training.local_update import context, raw_of
from fedtorch.training.module import snapshot
from fedtorch.training.stacked import Chunk, stacked
from fedtorch.types import Raw, Released, Task
from tests.smuggled import send

NUMBERS = {"clip": 1.0, "noise": 1.0}
PLANS = [SampleLevel(rounds=1), ClientLevel(rounds=1), LocalDP(rounds=1)]


def raw(plan: Privacy, **more: torch.Tensor) -> tuple[Raw, Task]:
    """What two clients' visits left, with ``more`` figures that a wrong strategy or solver put there."""
    model, who = mlp(), make_clients([5, 7])
    recipe, task = Recipe(FedAvg(), privacy=plan), Task(snapshot(model), {}, 0, 0, 0.1, NUMBERS)
    order = Nothing().batches([5, 7], recipe, task, ["c0", "c1"])
    ctx = context(who, order, task, recipe, model)
    trained = stacked(model, Chunk([c.data for c in who], order, ctx), task, recipe)
    found, _ = raw_of(ClientsData(who, order, task, recipe, model, {}), ctx, trained)
    found.figures.update(more)
    return found, task


def test_nobody_but_a_plan_makes_what_is_sent():
    with pytest.raises(TypeError, match=r"only Privacy\.release makes"):
        Released(("c0",), {}, {}, torch.ones(1))


def test_nobody_exchanges_a_part_of_what_is_sent():
    released, _ = Nothing().release(*raw(Nothing()))
    with pytest.raises(TypeError, match=r"only Privacy\.release makes"):
        replace(released, sent={})
    with pytest.raises(FrozenInstanceError):
        released.sent = {}


@pytest.mark.parametrize("chunk", [1, 4])
def test_an_observer_is_shown_a_copy(chunk):
    class Swaps(Observer):
        def sent(self, released):
            for v in released.sent["delta"].values():
                v.mul_(1e6)
            released.sent.clear()
            released.weight.zero_()

    found = []
    for who in ([], [Swaps()]):
        server = Server(mlp(), make_clients([5, 7]), engine=Local(chunk=chunk), observers=who)
        server.round()
        found.append(server.last_step)
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


def test_what_was_not_released_is_not_sent():
    with pytest.raises(TypeError, match="not Raw"):
        send(raw(Nothing())[0])


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: type(p).__name__)
def test_a_figure_that_no_plan_names_stays_where_it_is(plan):
    found, task = raw(plan, mean_of_rows=torch.ones(2))
    released, _ = plan.release(found, task)
    assert "mean_of_rows" not in released.metrics and "update_norm" in released.metrics


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: type(p).__name__)
def test_no_plan_can_open_another_way_out(plan):
    with pytest.raises(TypeError, match="release"):
        type("Open", (type(plan),), {"release": lambda self, raw, task: raw})


def test_one_client_of_a_context_has_its_own_rows_and_the_others_keep_theirs():
    model, who = mlp(), make_clients([5, 7])
    recipe, task = Recipe(FedAvg()), Task(snapshot(model), {}, 0, 0, 0.1, NUMBERS)
    order = Nothing().batches([5, 7], recipe, task, ["c0", "c1"])
    ctx = context(who, order, task, recipe, model)
    second = ctx.of(1)
    assert second.steps.tolist() == ctx.steps[1:].tolist() == [len(order[1])]
    assert second.seeds == ctx.seeds[1:]
    assert len(ctx.steps) == len(ctx.seeds) == 2
    assert second.anchor is ctx.anchor


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_says_whether_it_shortens_what_clients_learned(plan):
    scale = plan.scale(torch.tensor([100.0]), torch.ones(1), raw(plan)[1])
    assert plan.shortens is bool(scale != 1)
