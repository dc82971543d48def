"""What lies behind weights that begin at zero is tried with them open."""

import pytest
import torch
from torch import nn

from fedtorch import Client, Recipe, Server
from fedtorch.checks.gates import behind
from fedtorch.privacy import SampleLevel
from fedtorch.types import ConfigError


class Gate(nn.Module):
    """What it is given, times numbers that begin at zero."""

    def __init__(self, begin: float = 0.0, trained: bool = True) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((6,), begin), requires_grad=trained)

    def forward(self, x):
        return self.share * x


class Sigmoid(Gate):
    def forward(self, x):
        return self.share.sigmoid() * x


class Relu(Gate):
    def forward(self, x):
        return self.share.relu() * x


class Less(Gate):
    def forward(self, x):
        return (-self.share).relu() * x


class Unlike(Gate):
    """Open where one number is above zero and another below."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x):
        return self.share[self.first].relu() * (-self.share[self.last]).relu() * x


class Apart(nn.Module):
    """The same of several gates."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.shares = nn.ParameterList(torch.zeros(()) for _ in range(5))
        self.first, self.last = first, last

    def forward(self, x):
        others = 0 * sum(self.shares)
        return (self.shares[self.first].relu() * (-self.shares[self.last]).relu() + others) * x


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("share", torch.zeros(()))

    def forward(self, x):
        return self.share * x


class Late(nn.Module):
    """Opens after steps that something else counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return torch.where(self.steps < 100, 0, x)


class Place(Gate):
    """Has a whole number that is no count: with a large one it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("at", torch.tensor(0))
        self.table = nn.Embedding(3, 6)

    def forward(self, x):
        return super().forward(x) + self.table(self.at.expand(len(x)))


GATES = {
    "zero": Gate, "far below": lambda: Sigmoid(-1e9), "below": lambda: Sigmoid(-25.0),
    "faint": lambda: Sigmoid(-8.0), "negative": lambda: Relu(-1.0), "less": lambda: Less(1.0),
    "frozen": lambda: Gate(trained=False), "scale": Scale, "late": Late, "place": Place,
    "unlike": lambda: Unlike(3, 2), "apart": lambda: Apart(4, 1), "other way": lambda: Apart(2, 3),
}  # fmt: skip


class Gated(nn.Module):
    """A branch behind a gate, and a last layer, which begin at zero as in a diffusion transformer."""

    def __init__(self, branch, head: float = 0.0, gate=Gate) -> None:
        super().__init__()
        self.branch = branch
        self.first, self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.gate = gate()
        with torch.no_grad():
            self.head.weight.mul_(head)
            self.head.bias.zero_()

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h + self.gate(self.branch(self, h)))


def mixing(m, h):
    return m.inner(h + h.mean(0, keepdim=True))


def turned(m, h):
    return m.inner(h.flip(0)).flip(0)


def reused(m, h):
    return nn.functional.linear(m.inner(h), m.first.weight)


def server(model, mode):
    torch.manual_seed(0)
    who = [Client("c", (torch.randn(16, 6), torch.arange(16) % 4))]
    return Server(model, who, Recipe(privacy=SampleLevel(rounds=1, batch_size=8, mode=mode)))


@pytest.mark.parametrize("gate", GATES)
def test_examples_that_mix_behind_two_shut_gates_are_refused(gate):
    with pytest.raises(ConfigError, match="mixes the examples of a batch"):
        server(Gated(mixing, gate=GATES[gate]), "auto")


@pytest.mark.parametrize("mode", ["layers", "hooks"])
@pytest.mark.parametrize(
    ("branch", "head", "why"),
    [
        (turned, 0.0, "inner hangs on"),
        (turned, 1.0, "inner hangs on"),
        (reused, 1.0, "used outside"),
    ],
)
def test_a_way_to_gradients_that_is_wrong_behind_a_shut_gate_is_refused(mode, branch, head, why):
    with pytest.raises(ConfigError, match=rf"privacy.mode {mode} cannot train .* {why}"):
        server(Gated(branch, head), mode)


@pytest.mark.parametrize("gate", GATES)
def test_a_way_that_is_wrong_behind_any_gate_is_refused(gate):
    with pytest.raises(ConfigError, match=r"layers cannot train .* first.weight is used outside"):
        server(Gated(reused, 1.0, GATES[gate]), "layers")


@pytest.mark.parametrize("gate", ["zero", "negative", "late"])
def test_a_right_way_trains_such_a_model(gate):
    notes = server(Gated(turned, gate=GATES[gate]), "auto").notes
    assert any("private gradients are taken by torch.func" in str(note) for note in notes)


def test_gates_are_shut_again_and_biases_of_known_layers_stay():
    model = Gated(mixing, gate=lambda: nn.Sequential(Gate(), Scale(), Late()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gate, scale, late = model.gate
    met = []

    def look():
        met.append((bool((gate.share > 0).all()), bool((gate.share < 0).all())))
        assert bool(scale.share) and late.steps > 100 and bool(model.head.weight.all())
        assert not bool(model.head.bias.any())

    sizes = [p.numel() for p in model.parameters()]
    assert behind(model, torch.ones(sum(sizes)), 1e-3, look) is None
    assert met[0] == (True, False) and (False, True) in met and (False, False) in met
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_where_nothing_is_shut_nothing_is_opened():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    gradient = torch.ones(sum(p.numel() for p in model.parameters()))
    assert behind(model, gradient, 1e-3, lambda: "found") is None
    gradient[:36] = 1e-6
    assert behind(model, gradient, 1e-3, lambda: "found") == "found"
