"""The losses at the end of the dense part: gradient of each example's loss, and the losses kept."""

import torch
from torch import Tensor

from fedtorch.losses import Loss, reduce


class CrossEntropy:
    """Softmax minus one-hot."""

    def __init__(self, y: Tensor, scale: Tensor) -> None:
        """Labels [K, T]; ``scale`` [K, T, 1] is 1 / size of the batch, 0 where there is no example."""
        self.y, self.scale = y[..., None], scale
        self.z = self.hot = torch.empty(0)

    def __call__(self, z: Tensor, k: int, rows: slice) -> Tensor:
        """Logits [k, B, C] of the rows of a step -> gradient."""
        if not len(self.z):
            self.z = z.new_zeros(*self.y.shape[:2], z.shape[2])
            self.hot = self.z.scatter(2, self.y, 1.0)
        self.z[:k, rows] = z
        return z.softmax(-1).sub_(self.hot[:k, rows])

    def total(self) -> Tensor:
        """Sum over steps of the mean loss of each batch, [K]."""
        losses = self.z.logsumexp(2, keepdim=True) - self.z.gather(2, self.y)
        # where there is no example there are no logits either
        return torch.where(self.scale > 0, losses * self.scale, 0).double().sum((1, 2))


class AnyLoss:
    """A loss for each example, differentiated by autograd on the outputs alone."""

    def __init__(self, y: Tensor, scale: Tensor, loss: Loss) -> None:
        """As above."""
        self.y, self.scale, self.loss = y, scale, loss
        self.losses = torch.zeros(scale.shape[:2], device=scale.device)

    def __call__(self, z: Tensor, k: int, rows: slice) -> Tensor:
        """Outputs [k, B, ...] of the rows of a step -> gradient."""
        out = z.flatten(0, 1).detach().requires_grad_()
        with torch.enable_grad():
            each = reduce(self.loss(out, self.y[:k, rows].flatten(0, 1)))
            (d,) = torch.autograd.grad(each.sum(), out)
        self.losses[:k, rows] = each.detach().view(z.shape[:2]).to(self.losses.dtype)
        return d.view(z.shape)

    def total(self) -> Tensor:
        """Sum over steps of the mean loss of each batch, [K]."""
        return (self.losses * self.scale[..., 0]).double().sum(1)


def squeezed(loss: Loss) -> Loss:
    """The loss of outputs [B], for outputs [B, 1]."""
    return lambda output, target: loss(output.squeeze(-1), target)
