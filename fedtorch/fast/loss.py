"""The losses at the end of the dense part: gradient of each example's loss, and the losses added up."""

import torch
from torch import Tensor

from fedtorch.fast.ops import compiled
from fedtorch.training.losses import Loss, reduce


class CrossEntropy:
    """Softmax minus one-hot."""

    def __init__(self, y: Tensor, scale: Tensor, factor: Tensor) -> None:
        """Labels [K, T]; ``scale`` [K, T, 1] is 1 / size of the batch, 0 where there is no example.

        ``factor`` [K, T, 1] is what gradients are multiplied by, 0 there too.
        """
        self.y, self.scale, self.factor = y[..., None], scale, factor
        self.totals = scale.new_zeros(len(y), dtype=torch.float64)
        self.checked = False
        self.fast = compiled(scale)
        if self.fast:
            self.arrays = self.y.numpy(), scale.numpy(), factor.numpy()

    def __call__(self, z: Tensor, k: int, rows: slice) -> Tensor:
        """Logits [k, B, C] of the rows of a step -> gradient times factor."""
        if not self.checked:  # a loop would read whatever is there
            self._check(z.shape[2])
        if self.fast:
            d = z.new_empty(z.shape)
            given = z.contiguous().numpy(), *self.arrays, rows.start
            self.fast.cross_entropy(*given, d.numpy(), self.totals.numpy())
            return d
        y, logs = self.y[:k, rows], z.log_softmax(-1)
        _add(self.totals, -logs.gather(2, y), self.scale[:k, rows])
        d = logs.exp_().scatter_add_(2, y, torch.full_like(logs[..., :1], -1))
        return d.mul_(self.factor[:k, rows])

    def total(self) -> Tensor:
        """Sum over steps of the mean loss of each batch, [K]."""
        return self.totals

    def _check(self, classes: int) -> None:
        low, high = (int(v) for v in self.y.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise IndexError(f"label {wrong} is out of bounds for {classes} outputs")
        self.checked = True


class AnyLoss:
    """A loss for each example, differentiated by autograd on the outputs alone."""

    def __init__(self, y: Tensor, scale: Tensor, factor: Tensor, loss: Loss) -> None:
        """As above."""
        self.y, self.scale, self.factor, self.loss = y, scale, factor, loss
        self.totals = scale.new_zeros(len(y), dtype=torch.float64)

    def __call__(self, z: Tensor, k: int, rows: slice) -> Tensor:
        """Outputs [k, B, ...] of the rows of a step -> gradient times factor."""
        out = z.flatten(0, 1).detach().requires_grad_()
        with torch.enable_grad():
            each = reduce(self.loss(out, self.y[:k, rows].flatten(0, 1)))
            (d,) = torch.autograd.grad(each.sum(), out)
        _add(self.totals, each.detach().view(*z.shape[:2], 1), self.scale[:k, rows])
        return d.view(z.shape) * self.factor[:k, rows]

    def total(self) -> Tensor:
        """As above."""
        return self.totals


def _add(totals: Tensor, losses: Tensor, scale: Tensor) -> None:
    """Losses [k, B, 1], but for those of rows without an example, which may be anything."""
    each = torch.where(scale > 0, losses.double() * scale, 0)
    totals[: len(each)] += each.sum((1, 2))


def squeezed(loss: Loss) -> Loss:
    """The loss of outputs [B], for outputs [B, 1]."""
    return lambda output, target: loss(output.squeeze(-1), target)
