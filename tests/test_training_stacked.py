import copy

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from conftest import make_clients, mlp, weights
from fedtorch import Client, ClientOptimizer, FedProx, Local, Recipe, Server
from fedtorch.engines import Processes
from fedtorch.privacy import SampleLevel
from fedtorch.training.evaluate import evaluate
from fedtorch.training.losses import cross_entropy
from fedtorch.training.module import forward, load, snapshot, to
from fedtorch.training.stacked import stacked


def test_load_and_snapshot_are_inverse_and_independent():
    model, other = mlp(), nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    state = snapshot(model)
    load(other, state)
    assert all(torch.equal(v, weights(other)[k]) for k, v in weights(model).items())
    with torch.no_grad():
        model[0].weight.zero_()
    assert float(state["0.weight"].abs().sum()) > 0


def test_inputs_may_be_tuples_and_dicts():
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    a, b = torch.ones(2), torch.zeros(2)
    assert forward(Two(), (a, b)).tolist() == [1.0, 1.0]
    assert forward(Two(), {"b": a, "a": b}).tolist() == [-1.0, -1.0]
    moved = to({"x": (a, [b]), "n": 3}, torch.device("meta"))
    assert moved["x"][0].is_meta
    assert moved["x"][1][0].is_meta
    assert moved["n"] == 3


class Pairs(Dataset):
    """Two named inputs for each example."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(n)
        self.a, self.b = torch.randn(n, 3, generator=g), torch.randn(n, 2, generator=g)

    def __len__(self) -> int:
        return len(self.a)

    def __getitem__(self, i: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return {"a": self.a[i], "b": self.b[i]}, (self.a[i].sum() > 0).long()


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.cat([a, b], -1))


def test_a_model_with_several_named_inputs_trains():
    server = Server(Joint(), [Client("p", Pairs(40)), Client("q", Pairs(25))], Recipe(lr=0.5))
    assert server.session.choice.solver is stacked
    losses = [figures["train_loss"] for figures in server.rounds(8)]
    assert losses[-1] < 0.8 * losses[0]


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize("chunk", [1, 3])
def test_weights_the_loss_never_reaches_stay_as_they_are(chunk):
    model = Unused()
    before = weights(model)
    recipe = Recipe(FedProx(mu=0.1), optimizer=ClientOptimizer("AdamW"), lr=0.01)
    Server(model, make_clients([5, 9, 3]), recipe, engine=Local(chunk=chunk)).round()
    assert torch.equal(model.idle.weight, before["idle.weight"])
    assert not torch.equal(model.used.weight, before["used.weight"])


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_scalar_parameter_trains(chunk):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(6, 4), nn.Parameter(torch.tensor(1.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.scale

    model = Scaled()
    Server(model, make_clients([8, 9]), Recipe(), engine=Local(chunk=chunk)).round()
    assert model.scale.item() != 1.0


def with_a_frozen_part() -> nn.Module:
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
    backbone.requires_grad_(False)
    return nn.Sequential(backbone.eval(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    "engine",
    [
        Local(),
        Local(chunk=1),
        Local(solver="general"),
        Local(solver="stacked", chunk=3),
        Processes(workers=1),
    ],
    ids=str,
)
def test_what_is_in_evaluation_mode_stays_in_it(engine):
    model, clients = with_a_frozen_part(), make_clients([9, 5, 17])
    by_hand, before = copy.deepcopy(model), weights(model)
    server = Server(model, clients, Recipe(batch_size=None, lr=0.2, epochs=1), engine=engine)
    next(server.rounds(1))
    server.close()
    assert "in evaluation mode, and left so while clients train: 0 and 4 more" in server.notes
    mean = torch.zeros_like(by_hand[1].weight)
    for c in clients:
        x, y = c.data.tensors
        loss = nn.functional.cross_entropy(by_hand(x), y)  # nothing is dropped, statistics are used
        (grad,) = torch.autograd.grad(loss, by_hand[1].weight)
        mean += len(c) / 31 * grad
    assert torch.allclose(model[1].weight, by_hand[1].weight - 0.2 * mean, atol=1e-6)
    after = weights(model)
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("0."))
    evaluate(model, clients[0].data, {"loss": cross_entropy})
    assert [m.training for m in model.modules()] == [True] + 5 * [False] + [True]


@pytest.mark.parametrize("engine", [Local(), Local(solver="general"), Local(chunk=3)], ids=str)
def test_a_model_in_evaluation_mode_as_a_whole_trains_as_a_whole(engine):
    ends = []
    for ready in (nn.Module.train, nn.Module.eval):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        server = Server(ready(model), make_clients([9, 5, 14]), engine=engine)
        next(server.rounds(1))
        ends.append(weights(model))
        said = [n for n in server.notes if "in evaluation mode as a whole" in n]
        assert len(said) == (ready is nn.Module.eval) and model.training == (
            ready is nn.Module.train
        )
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_model_may_have_its_own_idea_of_training():
    class Keeps(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self[0].eval()
            return self

    model = Keeps(nn.BatchNorm1d(6), nn.Linear(6, 4))
    before = weights(model)
    next(Server(model, make_clients([9, 5])).rounds(1))
    assert torch.equal(model[0].running_mean, before["0.running_mean"])


def shared(how: str) -> nn.Module:
    torch.manual_seed(0)
    again = nn.Linear(6, 6)
    if how == "layer":
        return nn.Sequential(again, nn.Tanh(), again, nn.Linear(6, 4))
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize("how", ["layer", "weight"])
@pytest.mark.parametrize("private", [False, True])
def test_a_layer_or_a_weight_with_two_names_trains_side_by_side(how, private):
    plan = SampleLevel(noise_multiplier=1e-9, rounds=1, steps=2, sample_rate=1.0, batch_size=8)
    ends = []
    for solver in ("general", "auto"):
        net = shared(how)
        recipe = Recipe(lr=0.5, privacy=plan if private else None)
        server = Server(net, make_clients([8] * 9), recipe, engine=Local(solver=solver))
        server.round()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert server.session.choice.solver is stacked
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
    assert (net[0] is net[2]) == (how == "layer") and net[2].weight is net[0].weight
