import pytest
import torch
import torch.nn.functional as F

from fedtorch import losses
from fedtorch.types import ConfigError


def test_cross_entropy_agrees_with_torch_for_classes_and_for_sequences():
    x, y = torch.randn(3, 5), torch.tensor([0, 4, 2])
    assert torch.allclose(losses.cross_entropy(x, y).mean(), F.cross_entropy(x, y))
    x, y = torch.randn(3, 7, 5), torch.randint(0, 5, (3, 7))
    assert losses.cross_entropy(x, y).shape == (3, 7)
    assert torch.allclose(losses.cross_entropy(x, y).mean(), F.cross_entropy(x.transpose(1, 2), y))


@pytest.mark.parametrize("loss", [losses.binary_cross_entropy, losses.mean_squared_error])
def test_a_column_of_outputs_meets_a_row_of_targets_without_broadcasting(loss):
    output, target = torch.randn(4, 1), torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert loss(output, target).shape == (4,)
    assert torch.equal(loss(output, target), loss(output[:, 0], target))
    with pytest.raises(ConfigError, match="one output for each target"):
        loss(torch.randn(4, 2), target)


def test_metrics_by_hand():
    assert losses.accuracy(
        torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1])
    ).tolist() == [
        1.0,
        0.0,
    ]
    hit = losses.binary_accuracy(torch.tensor([[-1.0], [2.0]]), torch.tensor([0.0, 0.0]))
    assert hit.tolist() == [1.0, 0.0]
    assert losses.mean_absolute_error(torch.tensor([1.0]), torch.tensor([3.0])).tolist() == [2.0]


def test_reduce_leaves_one_number_for_each_example():
    assert losses.reduce(torch.ones(4, 3, 2)).shape == (4,)
    assert losses.reduce(torch.ones(4)).shape == (4,)
    assert losses.reduce(torch.tensor(2.0)).shape == ()


@pytest.mark.parametrize(
    "loss",
    [
        losses.cross_entropy,
        lambda output, target: losses.cross_entropy(output, target),
        lambda output, target: F.cross_entropy(output, target),  # one number for the whole batch
    ],
)
@pytest.mark.parametrize("size", [1, 3, 7, 10, 33])
def test_backward_leaves_the_gradient_of_the_mean_to_the_last_bit(loss, size):
    g = torch.Generator().manual_seed(size)
    plain = torch.randn(size, 5, generator=g).requires_grad_()
    target = torch.randint(0, 5, (size,), generator=g)
    ours = plain.detach().clone().requires_grad_()
    expected = losses.reduce(loss(plain, target)).mean()
    expected.backward()
    value = losses.backward(loss, ours, target)
    assert torch.equal(ours.grad, plain.grad)
    assert not value.requires_grad
    assert torch.allclose(value, expected)


def test_an_ignored_target_still_counts_in_the_batch():
    x = torch.randn(4, 5).requires_grad_()
    target = torch.tensor([1, -100, 2, -100])
    value = losses.backward(losses.cross_entropy, x, target)
    assert torch.allclose(value, losses.cross_entropy(x, target).mean())
    assert not x.grad[1].any()


def test_backward_of_sequences_is_the_mean_over_all_of_them():
    x, y = torch.randn(3, 7, 5).requires_grad_(), torch.randint(0, 5, (3, 7))
    losses.backward(losses.cross_entropy, x, y)
    twin = x.detach().clone().requires_grad_()
    F.cross_entropy(twin.transpose(1, 2), y).backward()
    assert torch.allclose(x.grad, twin.grad)
