import pytest
import torch
import torch.nn.functional as F

from fedtorch.training import losses
from fedtorch.types import ConfigError


def test_cross_entropy_agrees_with_torch_for_classes_and_for_sequences():
    x, y = torch.randn(3, 5), torch.tensor([0, 4, 2])
    assert torch.allclose(losses.cross_entropy(x, y).mean(), F.cross_entropy(x, y))
    x, y = torch.randn(3, 5, 7), torch.randint(0, 5, (3, 7))
    assert losses.cross_entropy(x, y).shape == (3, 7)
    assert torch.allclose(losses.cross_entropy(x, y).mean(), F.cross_entropy(x, y))


@pytest.mark.parametrize(
    "shape", [(6, 6), (6, 6, 6), (6, 6, 6, 6), (2, 5, 5), (3, 4, 4, 4), (2, 3, 7, 3)]
)
def test_classes_are_on_axis_1_where_any_axis_fits(shape):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g).requires_grad_()
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=g)
    twin = x.detach().clone().requires_grad_()
    got, want = losses.cross_entropy(x, y), F.cross_entropy(twin, y, reduction="none")
    assert torch.allclose(got, want, atol=1e-6)
    got.mean().backward()
    want.mean().backward()
    assert torch.allclose(x.grad, twin.grad, atol=1e-7)
    assert torch.equal(losses.accuracy(x, y), (x.argmax(1) == y).float())
    # the same numbers, laid otherwise
    turned = x.detach().movedim(1, -1).contiguous().movedim(-1, 1)
    assert torch.allclose(losses.cross_entropy(turned, y), want, atol=1e-6)


@pytest.mark.parametrize(
    "output, target",
    [((3, 7, 5), (3, 7)), ((3, 5), (3, 1)), ((3, 5), (2,)), ((3,), (3,)), ((3, 4, 2, 2), (3, 2))],
)
@pytest.mark.parametrize("judge", [losses.cross_entropy, losses.accuracy])
def test_classes_elsewhere_than_on_axis_1_are_refused(judge, output, target):
    if judge is losses.accuracy and output == target:  # one logit each, of yes or no
        assert judge(torch.randn(output), torch.zeros(target)).shape == target
        return
    # a row of numbers is no probabilities of one example
    for dtype in (torch.int64, torch.float32):
        with pytest.raises(ConfigError, match="classes lie on axis 1"):
            judge(torch.randn(output), torch.zeros(target, dtype=dtype))


def test_probabilities_of_classes_are_targets_as_in_torch():
    x, p = torch.randn(3, 5, 4), torch.rand(3, 5, 4).softmax(1)
    want = F.cross_entropy(x, p, reduction="none")
    assert torch.allclose(losses.cross_entropy(x, p), want)


def test_ignored_positions_do_not_count_within_their_example():
    x, y = torch.randn(3, 5, 7), torch.randint(0, 5, (3, 7))
    y[0, 2:], y[2] = -100, -100
    loss, hits = (losses.reduce(f(x, y)) for f in (losses.cross_entropy, losses.accuracy))
    for k in (0, 1):
        assert torch.allclose(loss[k], F.cross_entropy(x[k : k + 1], y[k : k + 1]))
        kept = y[k] != -100
        assert torch.allclose(hits[k], (x[k].argmax(0) == y[k])[kept].float().mean())
    assert loss[2] == hits[2] == 0


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


@pytest.mark.parametrize("value", [None, {"loss": torch.tensor(2.0)}, (torch.tensor(2.0), 1)])
def test_what_is_no_number_is_named(value):
    with pytest.raises(
        ConfigError, match=f"one for each example or one for all, got {type(value).__name__}"
    ):
        losses.reduce(value)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_accuracy_of_one_logit_is_of_yes_or_no(shape: tuple[int, ...]) -> None:
    output, target = torch.tensor([2.0, -1.0, 3.0, -4.0]), torch.tensor([1, 0, 0, 0])
    for labels in (target, target.float()):
        assert losses.accuracy(output.view(shape), labels).tolist() == [1, 1, 0, 1]
