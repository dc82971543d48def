"""Examples out of gradients: exact where the papers say so, and nothing where there is nothing."""

import pytest
import torch
from torch import nn

from fedtorch.attacks.reconstruct import (
    divide,
    first_layer,
    label,
    last_of,
    match,
    nearest,
    psnr,
)
from fedtorch.training.losses import cross_entropy
from fedtorch.training.step import Supervised
from fedtorch.types import ConfigError


def gradients(net, x, y):
    loss = cross_entropy(net(x), y).mean()
    return dict(
        zip(
            [k for k, _ in net.named_parameters()],
            torch.autograd.grad(loss, [*net.parameters()]),
            strict=True,
        )
    )


def dense(inputs=6, hidden=5, act=nn.Tanh, **options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, hidden, **options), act(), nn.Linear(hidden, 4)
    ).double()


def test_an_example_alone_is_every_row_of_the_division():
    net, x = dense(), torch.rand(1, 2, 3, dtype=torch.float64)
    found = gradients(net, x, torch.tensor([2]))
    for scale in (1.0, -0.1, 1e-6):  # a step's length and its sign do not matter
        rows = divide(scale * found["1.weight"], scale * found["1.bias"])
        assert rows.shape == (5, 6) and torch.allclose(rows, x.flatten(1).expand(5, 6), atol=1e-12)


def test_of_a_batch_a_neuron_that_one_example_moved_is_that_example():
    net = dense(2, 2, nn.ReLU)
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(2))
        net[1].bias.fill_(-0.5)
    x = torch.tensor([[1.0, 0.2], [0.3, 0.9]], dtype=torch.float64)  # each wakes one neuron
    found = gradients(net, x, torch.tensor([0, 1]))
    rows = divide(found["1.weight"], found["1.bias"])
    assert torch.allclose(nearest(rows, x, 0, 1), x, atol=1e-12)


def test_rows_come_by_how_far_they_moved_and_those_at_rest_not_at_all():
    weight, bias = torch.tensor([[2.0], [0.0], [9.0]]), torch.tensor([1.0, 0.0, -3.0])
    assert divide(weight, bias).tolist() == [[-3.0], [2.0]]
    none = nearest(divide(weight, torch.zeros(3)), torch.zeros(2, 1), 0, 1)
    assert none.tolist() == [[0.5], [0.5]]


FIRST = {
    "flat": (nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()), "1"),
    "alone": (nn.Linear(4, 3), ""),
    "without a bias": (nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)), None),
    "behind another": (nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(4, 3)), None),
    "behind a convolution": (
        nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 3)),
        None,
    ),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_layer_to_divide_is_that_which_takes_the_input_itself(name):
    net, layer = FIRST[name]
    x = torch.rand(1, 4) if name == "alone" else torch.rand(1, 1, 2, 2)
    assert first_layer(net, x) == layer


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "weights"])
def test_the_class_is_where_the_gradient_is_negative(bias):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4, bias=bias))
    for y in range(4):
        found = gradients(net, torch.rand(1, 6), torch.tensor([y]))
        assert label(last_of(found, 4)) == y
    with pytest.raises(ConfigError, match="last layer with 7 outputs"):
        last_of(found, 7)


def test_matching_the_gradient_finds_the_example():
    net = dense(16, 12, bias=False)
    x, y = torch.rand(1, 1, 4, 4, dtype=torch.float64), torch.tensor([1])
    assert first_layer(net, x) is None
    seen = {k: -0.1 * v for k, v in gradients(net, x, y).items()}
    up = {k: -v for k, v in seen.items()}
    found, apart = match(net, Supervised(cross_entropy), up, x.shape[1:], y, 0.0, 1.0)
    assert float(psnr(found, x, 0, 1)) > 40 and apart < 1e-8
    noise = {k: torch.randn(v.shape, dtype=torch.float64) for k, v in up.items()}
    lost, far = match(net, Supervised(cross_entropy), noise, x.shape[1:], y, 0.0, 1.0)
    assert float(psnr(lost, x, 0, 1)) < 15 and far > 0.1


def test_decibels_are_of_the_range_of_the_data():
    true = torch.zeros(2, 3)
    near = psnr(torch.tensor([[0.1] * 3, [-5.0] * 3]), true, 0.0, 1.0)
    assert near.tolist() == pytest.approx([20.0, 120.0])  # what is below the range is cut
    assert float(psnr(true[:1] + 0.2, true[:1], 0.0, 2.0)) == pytest.approx(20.0)
