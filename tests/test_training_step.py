"""A step of one's own trains as a loop by hand does: every kind of batch, solver, plan and engine."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import StackDataset, Subset

from fedtorch import Client, ConfigError, Local, Recipe, Server
from fedtorch.training.losses import cross_entropy, reduce
from fedtorch.training.step import Supervised, backward


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        lambda output, target: cross_entropy(output, target),
        lambda output, target: F.cross_entropy(output, target),  # one number for the whole batch
    ],
)
@pytest.mark.parametrize("size", [1, 3, 7, 10, 33])
def test_backward_leaves_the_gradient_of_the_mean_to_the_last_bit(loss, size):
    g = torch.Generator().manual_seed(size)
    plain = torch.randn(size, 5, generator=g).requires_grad_()
    target = torch.randint(0, 5, (size,), generator=g)
    ours = plain.detach().clone().requires_grad_()
    expected = reduce(loss(plain, target)).mean()
    expected.backward()
    value = backward(Supervised(loss), nn.Identity(), (ours, target))
    assert torch.equal(ours.grad, plain.grad)
    assert not value.requires_grad
    assert torch.allclose(value, expected)


def test_an_ignored_target_still_counts_in_the_batch():
    x = torch.randn(4, 5).requires_grad_()
    target = torch.tensor([1, -100, 2, -100])
    value = backward(Supervised(cross_entropy), nn.Identity(), (x, target))
    assert torch.allclose(value, cross_entropy(x, target).mean())
    assert not x.grad[1].any()


def test_backward_of_sequences_is_the_mean_over_all_of_them():
    x, y = torch.randn(3, 5, 7).requires_grad_(), torch.randint(0, 5, (3, 7))
    backward(Supervised(cross_entropy), nn.Identity(), (x, y))
    twin = x.detach().clone().requires_grad_()
    F.cross_entropy(twin, y).backward()
    assert torch.allclose(x.grad, twin.grad)


def test_a_recipe_has_a_loss_or_a_step():
    with pytest.raises(ConfigError, match="leave out one"):
        Recipe(loss=F.mse_loss, step=lambda model, batch: model(batch).mean())
    with pytest.raises(ConfigError, match="step must be a function"):
        Recipe(step=3)


@pytest.mark.parametrize("solver", ["general", "stacked"])
def test_a_step_sees_the_model_and_whatever_the_dataset_yields(solver):
    x = torch.randn(24, 5)
    y = (x[:, 0] > 0).long()
    data = StackDataset(x=x, y=StackDataset(left=y, right=1 - y))

    def step(model, batch):
        h = model[0](batch["x"]).tanh()
        left, right = F.linear(h, model[2].weight, model[2].bias), model[2](-h)
        penalty = 0.01 * model[0].weight.square().sum()
        return (
            cross_entropy(left, batch["y"]["left"])
            + cross_entropy(right, batch["y"]["right"])
            + penalty
        )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    start = {k: v.clone() for k, v in model.named_parameters()}
    server = Server(
        model,
        [Client(str(k), Subset(data, range(k, 24, 3))) for k in range(3)],
        Recipe(step=step, lr=0.5, steps=1, batch_size=None),
        engine=Local(solver=solver, chunk=3),
    )
    server.round()
    assert server.session.choice.solver.__name__ == solver
    own = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    own.load_state_dict(start)
    step(own, {"x": x, "y": {"left": y, "right": 1 - y}}).mean().backward()
    for (k, p), q in zip(own.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(start[k] - 0.5 * p.grad, q, atol=1e-6), k
