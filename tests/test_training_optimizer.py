import pytest
import torch

from fedtorch import (
    ClientOptimizer,
    ConfigError,
    ServerAdagrad,
    ServerAdam,
    ServerSGD,
    ServerYogi,
)
from fedtorch.training.optimizer import ELEMENTWISE, by_name

W = {"w": torch.zeros(2)}
DELTA = {"w": torch.tensor([0.5, -2.0], dtype=torch.float64)}


def test_sgd_scales_and_momentum_adds_up():
    assert ServerSGD(lr=0.5).step(DELTA, {})[0]["w"].tolist() == [0.25, -1.0]
    heavy = ServerSGD(momentum=0.5)
    first, state = heavy.step(DELTA, heavy.init(W))
    second, _ = heavy.step(DELTA, state)
    assert first["w"].tolist() == [0.5, -2.0]
    assert second["w"].tolist() == [0.75, -3.0]


@pytest.mark.parametrize("make", [ServerAdagrad, ServerAdam, ServerYogi])
def test_adaptive_steps_are_pure(make):
    optimizer = make(lr=0.1)
    state = optimizer.init(W)
    before = {g: {k: v.clone() for k, v in s.items()} for g, s in state.items()}
    one, two = optimizer.step(DELTA, state), optimizer.step(DELTA, state)
    assert torch.equal(one[0]["w"], two[0]["w"])
    assert all(torch.equal(before[g]["w"], state[g]["w"]) for g in state)
    assert (one[0]["w"].sign() == DELTA["w"].sign()).all()


def test_yogi_forgets_more_slowly_than_adam():
    large, small = {"w": torch.full((1,), 10.0).double()}, {"w": torch.full((1,), 0.01).double()}
    left = {}
    for make in (ServerAdam, ServerYogi):
        optimizer = make()
        _, state = optimizer.step(large, optimizer.init({"w": torch.zeros(1)}))
        for _ in range(50):
            _, state = optimizer.step(small, state)
        left[make] = float(state["v"]["w"])
    assert left[ServerYogi] > left[ServerAdam]


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_learning_rates_that_cannot_train_are_refused(lr):
    with pytest.raises(ConfigError, match=r"strategy\.server\.lr must be a positive number"):
        ServerAdam(lr=lr)


def test_client_optimizers_go_by_name_or_path():
    assert ClientOptimizer("adamw").maker() is torch.optim.AdamW
    assert ClientOptimizer("torch.optim.SGD").maker() is torch.optim.SGD
    assert not {"lbfgs", "sparseadam", "optimizer"} & by_name().keys()
    with pytest.raises(ConfigError, match=r"unknown client optimizer 'sdg'; there are .*adam.*sgd"):
        ClientOptimizer("sdg").maker()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"momentun": 0.9}, "has no option 'momentun'; it has momentum, dampening"),
        ({"lr": 3.0}, "takes its rate from the recipe: give lr"),
        ({"momentum": -1.0}, "Invalid momentum"),
    ],
)
def test_wrong_options_are_named_before_training(args, why):
    with pytest.raises(ConfigError, match=f"client optimizer SGD.* {why}"):
        ClientOptimizer("SGD", args).check()


@pytest.mark.parametrize("cls", sorted(ELEMENTWISE, key=lambda c: c.__name__))
def test_optimizers_listed_as_elementwise_are(cls):
    """A step on two stacked rows equals two steps on one row each."""
    rows = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor([100.0, 0.0, -1.0])]
    grads = [torch.tensor([0.1, 5.0, -1.0]), torch.tensor([-3.0, 1e-3, 2.0])]
    assert ClientOptimizer(cls.__name__).elementwise

    def run(start: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        w = start.clone().requires_grad_()
        optimizer = ClientOptimizer(cls.__name__).build([w], 0.1)
        for t in range(4):
            w.grad = grad * (1 + t)
            optimizer.step()
        return w.detach()

    together = run(torch.stack(rows), torch.stack(grads))
    for k in range(2):
        assert torch.equal(together[k], run(rows[k], grads[k]))
