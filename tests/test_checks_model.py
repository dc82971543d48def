import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import make_clients, mlp
from fedtorch import ConfigError, Local, Recipe, Server
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


def test_parameters_that_are_views_of_one_another_are_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    model[1].weight = nn.Parameter(model[0].weight.data[1:5])
    with pytest.raises(ConfigError, match=r"0\.weight and 1\.weight of .* in the same memory"):
        Server(model, make_clients([5]))
    whole = torch.randn(60)  # side by side in one block, as an LSTM on a GPU lays them
    model[0].weight = nn.Parameter(whole[:36].view(6, 6))
    model[1].weight = nn.Parameter(whole[36:].view(4, 6))
    Server(model, make_clients([5])).round()


class Force(nn.Module):
    """Minus the gradient of an energy."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.energy, self.on = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)), on

    def forward(self, x):
        with torch.set_grad_enabled(self.on or torch.is_grad_enabled()):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_model_that_takes_gradients_as_it_runs_is_told_to_record_them():
    recipe = Recipe(loss=lambda output, target: output.square().mean(1))
    with pytest.raises(ConfigError, match=r"takes gradients as it runs.* torch\.enable_grad"):
        Server(Force(False), make_clients([5]), recipe)
    assert "train_loss" in Server(Force(True), make_clients([5]), recipe).round()


def test_a_weight_whose_numbers_are_one_is_refused_by_name():
    model = nn.Linear(6, 4)
    model.weight = nn.Parameter(torch.ones(4, 1).expand(4, 6))
    with pytest.raises(ConfigError, match=r"weight of model Linear is expanded, .*contiguous\(\)"):
        Server(model, make_clients([5]))


def test_a_weight_of_no_numbers_trains_along_also_one_client_after_another():
    class Spare(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*mlp())
            self.aaa = nn.Parameter(torch.zeros(0, 3))

    server = Server(Spare(), make_clients([8, 9]), engine=Local(solver="general"))
    assert server.round()["train_loss"] > 0
