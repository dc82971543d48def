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


def test_a_model_may_write_on_its_batch_and_keep_statistics_still_by_itself():
    class Still(nn.Sequential):
        def train(self, mode: bool = True):
            super().train(mode)
            self[1].eval()
            return self

        def forward(self, x):
            return super().forward(x.mul_(2))

    model = Still(nn.Linear(6, 4), nn.BatchNorm1d(4))
    before = model[1].running_mean.clone()
    plan = SampleLevel(rounds=1, noise_multiplier=1.0)
    Server(model, make_clients([8]), Recipe(privacy=plan)).round()
    assert torch.equal(model[1].running_mean, before)
    with pytest.raises(ConfigError, match=r"BatchNorm1d.* mixes the examples"):
        Server(nn.Sequential(*model), make_clients([8]), Recipe(privacy=plan))
