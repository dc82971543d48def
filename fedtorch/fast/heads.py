"""The losses at the end of the dense part: gradient of each example's loss, and the losses kept."""

import torch
from torch import Tensor

from fedtorch.fast.small import compiled
from fedtorch.losses import Loss, reduce


class CrossEntropy:
    """Softmax minus one-hot."""

    def __init__(self, y: Tensor, scale: Tensor) -> None:
        """Labels [K, T]; ``scale`` [K, T, 1] is 1 / size of the batch, 0 where there is no example."""
        self.y, self.scale = y[..., None], scale
        self.losses = scale.new_zeros(y.shape)
        self.checked = False

    def __call__(self, z: Tensor, k: int, rows: slice) -> Tensor:
        """Logits [k, B, C] of the rows of a step -> gradient."""
        if not self.checked:  # a loop would read whatever is there
            self._check(z.shape[2])
        if fast := compiled(z):
            d = torch.empty_like(z, memory_format=torch.contiguous_format)
            given = z.contiguous().numpy(), self.y.numpy(), rows.start
            fast.cross_entropy(*given, d.numpy(), self.losses.numpy())
            return d
        y, logs = self.y[:k, rows], z.log_softmax(-1)
        self.losses[:k, rows] = -logs.gather(2, y)[..., 0]
        return logs.exp_().scatter_add_(2, y, torch.full_like(logs[..., :1], -1))

    def total(self) -> Tensor:
        """Sum over steps of the mean loss of each batch, [K]."""
        scale = self.scale[..., 0]  # where there is no example there is no loss either
        return torch.where(scale > 0, self.losses * scale, 0).double().sum(1)

    def _check(self, classes: int) -> None:
        low, high = (int(v) for v in self.y.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise IndexError(f"label {wrong} is out of bounds for {classes} outputs")
        self.checked = True


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
