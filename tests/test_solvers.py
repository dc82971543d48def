import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from conftest import make_clients, mlp, weights
from fedtorch import Client, ClientOptimizer, FedProx, Local, Recipe, Server
from fedtorch.solvers import forward, load, snapshot, to


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
    assert "not a plain pair of tensors" in " ".join(server.session.notes)
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
