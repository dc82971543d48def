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
