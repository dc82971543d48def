"""What lies behind weights that begin at zero is tried with them open."""

import pytest
import torch
from torch import nn

from fedtorch import Client, Recipe, Server
from fedtorch.checks.gates import opened
from fedtorch.privacy import SampleLevel
from fedtorch.types import ConfigError


class Gate(nn.Module):
    """What it is given, times numbers that begin at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return self.share * x


class Gated(nn.Module):
    """A branch behind a gate, and a last layer, which begin at zero as in a diffusion transformer."""

    def __init__(self, branch, head: float = 0.0) -> None:
        super().__init__()
        self.branch = branch
        self.first, self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.gate = Gate()
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


def test_examples_that_mix_behind_two_shut_gates_are_refused():
    with pytest.raises(ConfigError, match="mixes the examples of a batch"):
        server(Gated(mixing), "auto")


@pytest.mark.parametrize("mode", ["layers", "hooks"])
@pytest.mark.parametrize(("branch", "head"), [(turned, 0.0), (turned, 1.0), (reused, 1.0)])
def test_a_way_to_gradients_that_is_wrong_behind_a_shut_gate_is_refused(mode, branch, head):
    with pytest.raises(
        ConfigError, match=rf"privacy.mode {mode} cannot train .* differ from those"
    ):
        server(Gated(branch, head), mode)


def test_a_right_way_trains_such_a_model():
    notes = server(Gated(turned), "auto").notes
    assert any("private gradients are taken by torch.func" in str(note) for note in notes)


def test_gates_are_shut_again_and_biases_of_known_layers_stay():
    model = Gated(mixing)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with opened(model) as hid:
        assert hid and bool((model.gate.share > 0).all()) and bool(model.head.weight.all())
        assert not bool(model.head.bias.any())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with opened(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))) as hid:
        assert not hid
