import pytest
import torch
from torch import nn

from conftest import make_clients
from fedtorch import ConfigError, Recipe, Server
from fedtorch.privacy import SampleLevel


def test_layers_that_draw_are_refused_for_what_they_do():
    class Noisy(nn.Linear):
        def forward(self, x):
            own = torch.Generator().manual_seed(torch.initial_seed())
            return super().forward(x + torch.randn(x.shape, generator=own))

    with pytest.raises(ConfigError, match="draws random numbers that no trial can hold still"):
        Server(Noisy(6, 4), make_clients([8]), Recipe(privacy=SampleLevel(rounds=1)))


def test_a_parameter_without_a_part_in_the_loss_is_named():
    class Spare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.extra = nn.Linear(2, 2)

    model = Spare()
    with pytest.raises(ConfigError, match=r"extra\.weight has no part in the loss of any example"):
        Server(model, make_clients([8]), Recipe(privacy=SampleLevel(rounds=1)))
