import random

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_clients, mlp
from fedtorch import ConfigError, Recipe, Server


class Follows(nn.Module):
    """A copy follows the weights as the model trains, as a mean teacher does."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.net = mlp()
        self.held = nn.Linear(6, 4).requires_grad_(False)
        for name, p in mlp().named_parameters():
            name, value = "copy_" + name.replace(".", "_"), p.detach().clone()
            if frozen:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(name, value)

    def forward(self, x):
        with torch.no_grad():
            for name, p in self.net.named_parameters() if self.training else ():
                getattr(self, "copy_" + name.replace(".", "_")).lerp_(p, 0.5)
        return self.net(x) + self.held(x)


def test_frozen_weights_that_follow_others_are_refused_and_buffers_averaged():
    with pytest.raises(ConfigError, match=r"parameter copy_0_weight of .* make it a buffer"):
        Server(Follows(frozen=True), make_clients([8, 9]))
    server = Server(Follows(frozen=False), make_clients([8, 9]), Recipe(lr=0.5))
    before = server.model.copy_0_weight.clone()
    server.round()
    assert not torch.equal(server.model.copy_0_weight, before)


def test_a_step_that_moves_frozen_weights_is_refused():
    model = nn.ModuleDict({"net": nn.Linear(6, 4), "center": nn.Linear(6, 1)})
    model["center"].requires_grad_(False)

    def step(model, batch):
        x, y = batch
        with torch.no_grad():
            model["center"].weight.add_(x.mean(0))
        return nn.functional.cross_entropy(model["net"](x), y, reduction="none")

    with pytest.raises(ConfigError, match=r"parameter center\.weight .* takes no gradient"):
        Server(model, make_clients([8, 9]), Recipe(step=step))


@pytest.mark.parametrize(
    "made", [lambda: torch.Generator(), lambda: np.random.default_rng(0), lambda: random.Random(0)]
)
def test_a_generator_that_a_model_keeps_is_said(made):
    model = mlp()
    model[0].draws = made()
    said = [n for n in Server(model, make_clients([8])).notes if "draws random numbers" in n]
    assert [n.startswith("attribute draws of layer 0 (Linear)") for n in said] == [True]


def test_statistics_that_are_a_mean_over_all_batches_say_that_no_visit_goes_on_with_the_count():
    def said(momentum, training=True):
        model = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=momentum), nn.Linear(5, 4)
        )
        if not training:
            model[1].train = lambda mode=True: nn.Module.train(model[1], False)
        return [n for n in Server(model.train(), make_clients([8, 9])).notes if "momentum" in n]

    (note,) = said(None)
    assert note.startswith("layer 1 (BatchNorm1d) has momentum=None") and "last round alone" in note
    assert said(0.1) == said(None, training=False) == []
