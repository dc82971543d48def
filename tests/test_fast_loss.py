import pytest
import torch
import torch.nn.functional as F

from fedtorch.fast.loss import AnyLoss, CrossEntropy


def labels(*shape, classes=5):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_and_its_gradient_are_those_of_torch(dtype):
    y, scale = labels(3, 6), torch.full((3, 6, 1), 0.5, dtype=dtype)
    scale[2, 4:] = 0
    factor = scale * 3
    head = CrossEntropy(y, scale, factor)
    z = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=dtype) * 4
    z[0, 0, 2], z[0, 1, 0] = 90, -torch.inf
    y[0, 1] = 1
    for rows in (slice(0, 2), slice(2, 4)):
        out = z[:, rows].requires_grad_()
        loss = F.cross_entropy(out.flatten(0, 1), y[:, rows].flatten(), reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), out)
        torch.testing.assert_close(head(z[:, rows].detach(), 3, rows), grad * factor[:, rows])
    head(z[:2, 4:], 2, slice(4, 6))  # the third client has stopped
    each = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(3, 6)
    each[2, 4:] = 0
    torch.testing.assert_close(head.total(), (each * 0.5).sum(1).double())


def test_a_loss_keeps_its_digits_beside_large_logits():
    z = torch.tensor([[[1e4, 9999.5, 0.0], [-3e4, 2e4, 2e4]]])
    head = CrossEntropy(torch.tensor([[0, 2]]), torch.ones(1, 2, 1), torch.ones(1, 2, 1))
    head(z, 1, slice(0, 2))
    each = F.cross_entropy(z[0], torch.tensor([0, 2]), reduction="none")
    torch.testing.assert_close(head.total(), each.double().sum()[None])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_spoil_their_own_row_alone(bad):
    y, scale = labels(2, 2), torch.ones(2, 2, 1)
    z = torch.zeros(2, 2, 5)
    z[0, 1, 3] = bad
    head = CrossEntropy(y, scale, scale)
    d = head(z, 2, slice(0, 2))
    assert d[0, 1].isnan().any() and d[0, 0].isfinite().all() and d[1].isfinite().all()
    assert head.total()[1].isfinite() and not head.total()[0].isfinite()


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_without_an_output_is_refused(label):
    y = labels(2, 2)
    y[1, 0] = label
    with pytest.raises(IndexError, match=rf"label {label} is out of bounds for 5 outputs"):
        CrossEntropy(y, *[torch.ones(2, 2, 1)] * 2)(torch.zeros(2, 1, 5), 2, slice(0, 1))


@pytest.mark.parametrize("kind", ["known", "any"])
def test_rows_without_an_example_have_no_loss_and_no_gradient(kind):
    y, scale = labels(2, 3), torch.full((2, 3, 1), 0.5)
    scale[1, 2] = 0
    weights = y, scale, scale * 2
    each = lambda z, t: F.cross_entropy(z, t, reduction="none")  # noqa: E731
    head = CrossEntropy(*weights) if kind == "known" else AnyLoss(*weights, each)
    z = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    d, losses = head(z, 2, slice(0, 3)), each(z.flatten(0, 1), y.flatten()).view(2, 3)
    wanted = z.softmax(2) - F.one_hot(y, 5)
    wanted[1, 2] = losses[1, 2] = 0
    torch.testing.assert_close(d, wanted)
    torch.testing.assert_close(head.total(), losses.double().sum(1) / 2)
