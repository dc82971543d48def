"""What a strategy may ask of clients' data: losses and gradients, held to autograd by hand."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from conftest import make_clients, mlp, weights
from fedtorch import ConfigError, FedAvg, Local, Recipe, Server, Strategy
from fedtorch.privacy import Nothing, SampleLevel
from fedtorch.training.asked import ClientsData
from fedtorch.training.module import snapshot
from fedtorch.types import Task

SIZES = [7, 12, 5]


def normed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


def asked(model: nn.Module, **options: object) -> ClientsData:
    recipe, clients = Recipe(FedAvg(), epochs=2, batch_size=5, **options), make_clients(SIZES)
    task = Task(snapshot(model), {}, 0, 0, 0.1)
    order = Nothing().batches(SIZES, recipe, task, [c.id for c in clients])
    return ClientsData(clients, order, task, recipe, model, {})


def by_hand(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    params = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, [*params.values()])
    return dict(zip(params, grads, strict=True)) | {"loss": loss.detach()}


def test_losses_and_gradients_are_those_of_all_examples_or_of_one_step():
    model = mlp()
    data = asked(model)
    losses, (grads, also) = data.loss(), data.grad()
    (step, short), over = data.grad(step=2), data.grad(step=5)
    for k, client in enumerate(data.clients):
        x, y = client.data.tensors
        want = by_hand(model, x, y)
        assert float(losses[k]) == pytest.approx(float(want["loss"]), abs=1e-6)
        assert float(also[k]) == pytest.approx(float(want["loss"]), abs=1e-6)
        assert all(torch.allclose(g[k], want[n], atol=1e-6) for n, g in grads.items())
        if len(data.order[k]) > 2:
            places = data.order[k][2][data.order[k][2] >= 0]
            want = by_hand(model, x[places], y[places])
            assert float(short[k]) == pytest.approx(float(want["loss"]), abs=1e-6)
            assert all(torch.allclose(g[k], want[n], atol=1e-6) for n, g in step.items())
        else:
            assert not any(g[k].any() for g in step.values()) and short[k] == 0
    assert [bool(v) for v in over[1]] == [False, True, False], "whose steps are over"


def test_weights_of_each_client_may_be_asked_about():
    model = mlp()
    data, at = asked(model), {n: torch.stack([v, 2 * v, -v]) for n, v in weights(model).items()}
    grads, _ = data.grad(at)
    for k, client in enumerate(data.clients):
        other = mlp()
        other.load_state_dict({n: v[k] for n, v in at.items()})
        want = by_hand(other, *client.data.tensors)
        assert all(torch.allclose(g[k], want[n], atol=1e-6) for n, g in grads.items())
        assert float(data.loss(at)[k]) == pytest.approx(float(want["loss"]), abs=1e-6)
    only = {"0.weight": at["0.weight"]}
    assert data.grad(only)[0].keys() == only.keys()
    assert data.among([2]).loss(at_row(at, 2)) == data.loss(at)[2]


def at_row(at: dict[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    return {n: v[k : k + 1] for n, v in at.items()}


def test_the_model_is_left_as_it_was_and_dropout_draws_by_client():
    model = normed().train()
    model[1].eval()
    data, before = asked(model), snapshot(model)
    grads, _ = data.grad()
    data.loss()
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in snapshot(model).items())
    assert all(p.grad is None for p in model.parameters())
    again, _ = replace(asked(model), model=model).among([1]).grad()
    assert torch.equal(again["3.weight"][0], grads["3.weight"][1]), "whoever is beside it"
    assert not torch.equal(data.grad()[0]["3.weight"], grads["3.weight"]), "the next call's own"


@dataclass(frozen=True, kw_only=True)
class Curious(Strategy):
    """It does not say that it asks."""

    def upload(self, params, ctx):
        grad, _ = ctx.data.grad()
        return {"delta": {k: -ctx.lr * v for k, v in grad.items()}}, {}


def test_a_strategy_that_sends_gradients_is_stopped_where_nobody_noises_them():
    for solver in ("general", "stacked", "fast"):
        server = Server(
            mlp(), make_clients([6, 9]), Recipe(Curious(), lr=0.1), engine=Local(solver=solver)
        )
        server.round()
        model, want = mlp(), 0
        for client in make_clients([6, 9]):
            grad = by_hand(model, *client.data.tensors)["0.weight"]
            want = want - 0.1 * grad * len(client) / 15
        assert torch.allclose(server.model[0].weight - model[0].weight, want, atol=1e-6)
    plan = SampleLevel(noise_multiplier=1.0, rounds=1, insecure_seed=1)
    server = Server(mlp(), make_clients([6, 9]), Recipe(Curious(), privacy=plan))
    with pytest.raises(ConfigError, match="under sample-level privacy only train may ask"):
        server.round()


@dataclass(frozen=True, kw_only=True)
class Sly(Strategy):
    """It says that one noised pass is all that it sends, and sends another."""

    apart = True

    def train(self, solve, ctx):
        solve()
        return solve(steps=2), {}


@dataclass(frozen=True, kw_only=True)
class Twice(Strategy):
    apart = True

    def train(self, solve, ctx):
        solve()
        return solve(), {}


@dataclass(frozen=True, kw_only=True)
class Uploads(Strategy):
    apart = True

    def train(self, solve, ctx):
        return solve(), {}

    def upload(self, params, ctx):
        return super().upload(params, ctx)


def test_sample_level_privacy_sends_nothing_but_the_pass_that_it_noised():
    plan = SampleLevel(noise_multiplier=1.0, rounds=1, insecure_seed=1)
    for strategy, why in [(Sly(), "must return what solve"), (Twice(), "one pass a visit")]:
        server = Server(mlp(), make_clients([6, 9]), Recipe(strategy, privacy=plan))
        with pytest.raises(RuntimeError, match=why):
            server.round()
    with pytest.raises(ConfigError, match="uploads sends steps that start from"):
        Server(mlp(), make_clients([6, 9]), Recipe(Uploads(), privacy=plan))
