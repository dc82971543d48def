"""Activations between dense layers are torch's own, in value and in gradient."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedtorch import Client, Local, Recipe, Server
from fedtorch.fast import reader
from fedtorch.training.losses import cross_entropy


def trained(model: nn.Module, recipe: Recipe, solver: str) -> dict[str, torch.Tensor]:
    """What two rounds change, in float64: in float32 rounding would hide much."""
    model = model.double()
    g = torch.Generator().manual_seed(0)
    who = [
        Client(
            f"c{k}",
            (torch.randn(n, 30, generator=g).double(), torch.randint(0, 4, (n,), generator=g)),
        )
        for k, n in enumerate((37, 5, 18, 1))
    ]
    start = copy.deepcopy(model.state_dict())
    list(Server(model, who, recipe, engine=Local(solver=solver), seed=3).rounds(2))
    return {k: v - start[k] for k, v in model.state_dict().items()}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in a)


class Softmaxes(nn.Module):
    """Along the features of a row, however that is said."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(*n) for n in ((30, 9), (9, 8), (8, 7), (7, 6), (6, 5), (5, 4))
        )
        self.soft, self.log = nn.Softmax(-1), nn.LogSoftmax(dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d, e, f = self.layers
        x = F.log_softmax(d(c(b(a(x).softmax(1)).log_softmax(dim=-1))), dim=1)
        return self.log(f(torch.softmax(self.soft(e(x)), 1)))


@pytest.mark.parametrize(
    "loss", [cross_entropy, lambda out, y: F.nll_loss(out, y, reduction="none")]
)
def test_softmax_along_the_features(loss):
    ends = []
    for solver in ("general", "fast"):
        torch.manual_seed(0)
        ends.append(trained(Softmaxes(), Recipe(loss=loss, lr=0.3, batch_size=8), solver))
    assert apart(*ends) < 1e-6


@pytest.mark.parametrize("last", [nn.LogSoftmax(0), nn.Softmax(2)])
def test_softmax_along_other_axes_is_not_read(last):
    model = nn.Sequential(nn.Linear(30, 4), last)
    assert reader.read(model, torch.zeros(2, 30)) == "it does not end in a linear layer"


class Called(nn.Module):
    """Activations as functions, with their options said in one way or another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, n - 2) for n in range(30, 4, -2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        acts = (
            lambda x: F.leaky_relu(x, 0.2, inplace=True), lambda x: F.elu(x, alpha=0.7), F.mish,
            F.selu, torch.selu, F.relu6, lambda x: F.softplus(x, 2.0),
            lambda x: F.softplus(x, threshold=1.0),
            lambda x: F.gelu(x, approximate="tanh"), F.hardswish, torch.tanh, torch.sigmoid,
        )  # fmt: skip
        for layer, act in zip(self.layers, acts, strict=False):
            x = act(layer(x))
        return self.layers[-1](x)


def layered() -> nn.Module:
    acts = (
        nn.LeakyReLU(0.3), nn.ELU(0.5, inplace=True), nn.SELU(), nn.ReLU6(), nn.Softplus(0.5, 3.0),
        nn.Hardswish(), nn.Mish(), nn.GELU("tanh"), nn.SiLU(),
    )  # fmt: skip
    pairs = [(nn.Linear(30, 30), act) for act in acts]
    return nn.Sequential(*itertools.chain(*pairs), nn.Linear(30, 4))


@pytest.mark.parametrize("make", [Called, layered])
def test_all_activations_are_those_of_torch(make):
    ends = []
    for solver in ("general", "fast"):
        torch.manual_seed(0)
        model = make()
        for p in model.parameters():
            p.data.mul_(2)  # away from where all of them are straight lines
        ends.append(trained(model, Recipe(lr=0.05, batch_size=8), solver))
    assert reader.read(make(), torch.zeros(2, 30)).front is None
    assert apart(*ends) < 1e-6


def test_an_activation_that_is_told_more_than_is_known_is_not_read():
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(30, 4)

        def forward(self, relu: torch.Tensor) -> torch.Tensor:
            return F.log_softmax(self.out(relu), 1, dtype=torch.float64)

    assert reader.read(Typed(), torch.zeros(2, 30)) == "it does not end in a linear layer"
