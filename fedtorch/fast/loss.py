"""The losses at the end of the dense part: gradient of each example's loss, and the losses added up."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fedtorch.fast.copies import Own
from fedtorch.fast.layers import Layer
from fedtorch.fast.ops import Ops
from fedtorch.training.losses import Loss, reduce


class CrossEntropy:
    """Softmax minus one-hot."""

    def __init__(self, y: Tensor, scale: Tensor, factor: Tensor) -> None:
        """Labels [K, T]; ``scale`` [K, T, 1] is 1 / size of the batch, 0 where there is no example.

        ``factor`` [K, T, 1] is what gradients are multiplied by, 0 there too.
        """
        self.y, self.scale, self.factor = y[..., None], scale, factor
        self.losses, self.checked = torch.zeros_like(scale), False

    def __call__(self, z: Tensor, k: int, rows: slice) -> Tensor:
        """Logits [k, B, C] of the rows of a step -> gradient times factor."""
        if not self.checked:  # a loop would read whatever is there
            self.check(z.shape[2])
        y, logs = self.y[:k, rows], z.log_softmax(-1)
        self.losses[:k, rows] = logs.gather(2, y)
        return logs.exp_().scatter_add_(2, y, self.minus[:k, rows]).mul_(self.factor[:k, rows])

    @cached_property
    def minus(self) -> Tensor:
        """-1 for each example: whole visits have no use for it."""
        return -torch.ones_like(self.scale)

    def total(self) -> Tensor:
        """Sum over steps of the mean loss of each batch, [K]."""
        return summed(-self.losses, self.scale)

    def check(self, classes: int) -> None:
        """Raises IndexError where a label is none of so many classes."""
        low, high = (int(v) for v in self.y.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise IndexError(f"label {wrong} is out of bounds for {classes} outputs")
        self.checked = True


class Closing:
    """A small last layer of every client's own and the cross entropy behind it, a step in one call."""

    def __init__(self, layer: Own, head: CrossEntropy, ops: Ops) -> None:
        """For a ``layer`` that ``closes``."""
        self.layer, self.head, self.ops = layer, head, ops
        self.weights = layer.weight.value, None if layer.bias is None else layer.bias.value
        self.given = head.y, head.scale, head.factor, head.losses
        head.check(layer.weight.value.shape[1])

    def __call__(self, a: Tensor, k: int, rows: slice) -> Tensor:
        """Inputs [k, B, in] of the layer -> the gradient of what the layer before put out."""
        keep, mask = self.layer.weight.rule.keep, self.layer.mask
        return self.ops.closing(a, self.weights, self.given, rows.start, keep, mask)


def closed(
    layers: Sequence[Layer], head: "CrossEntropy | AnyLoss", ops: Ops
) -> tuple[Sequence[Layer], "CrossEntropy | AnyLoss | Closing"]:
    """The layers to walk through and what is at their end: a small last one and cross entropy are one."""
    last = layers[-1]
    if isinstance(last, Own) and last.closes and isinstance(head, CrossEntropy):
        return layers[:-1], Closing(last, head, ops)
    return layers, head


class AnyLoss:
    """A loss for each example, differentiated by autograd on the outputs alone."""

    def __init__(self, y: Tensor, scale: Tensor, factor: Tensor, loss: Loss) -> None:
        """As above."""
        self.y, self.scale, self.factor, self.loss = y, scale, factor, loss
        self.losses = torch.zeros_like(scale)

    def __call__(self, z: Tensor, k: int, rows: slice) -> Tensor:
        """Outputs [k, B, ...] of the rows of a step -> gradient times factor."""
        out = z.flatten(0, 1).detach().requires_grad_()
        with torch.enable_grad():
            each = reduce(self.loss(out, self.y[:k, rows].flatten(0, 1)))
            (d,) = torch.autograd.grad(each.sum(), out)
        self.losses[:k, rows] = each.detach().view(*z.shape[:2], 1)
        return d.view(z.shape) * self.factor[:k, rows]

    def total(self) -> Tensor:
        """As above."""
        return summed(self.losses, self.scale)


def summed(losses: Tensor, scale: Tensor) -> Tensor:
    """Losses [K, T, 1] times scale, added up in float64, [K]; without an example they may be anything."""
    return torch.where(scale > 0, losses.double() * scale, 0).sum((1, 2))


def squeezed(loss: Loss) -> Loss:
    """The loss of outputs [B], for outputs [B, 1]."""
    return lambda output, target: loss(output.squeeze(-1), target)
