import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import make_clients, mlp
from fedtorch import ConfigError, Recipe, Server
from fedtorch.training.losses import cross_entropy


def test_a_sparse_buffer_is_refused_by_name():
    model = nn.Linear(6, 4)
    model.register_buffer("extra", torch.eye(4).to_sparse())
    with pytest.raises(ConfigError, match="extra of model Linear is sparse"):
        Server(model, make_clients([5]))


def test_a_model_without_numbers_is_refused():
    with pytest.raises(ConfigError, match="weight of model Linear is on device meta"):
        Server(nn.Linear(6, 4, device="meta"), make_clients([5]))


def test_what_holds_the_model_handed_over_is_refused():
    class Keeps(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.call = lambda x: F.linear(x, self.weight, self.bias)

        def forward(self, x):
            return self.call(x)

    model = Keeps()
    with pytest.raises(ConfigError, match=r"uses parameter weight of the very model handed over"):
        Server(model, make_clients([5]))
    assert model.weight.grad is None
    plain = mlp()

    def loss(output, target):
        return cross_entropy(output, target) + plain[0].weight.square().sum()

    with pytest.raises(
        ConfigError, match=r"the loss or step, .* uses parameter 0\.weight of the very model"
    ):
        Server(plain, make_clients([5]), Recipe(loss=loss))
