"""Linear layers of which every client has its own copy, and products of its few rows with it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedtorch.fast.chunk_data import Rows, taken
from fedtorch.fast.layers import Leaf, squares
from fedtorch.fast.ops import masked
from fedtorch.fast.reader import Linear
from fedtorch.fast.schedule import LockstepOrder
from fedtorch.fast.tuning import CLOSING
from fedtorch.tree import exact_sq_norms
from fedtorch.types import Params, Stack


class Own:
    """A linear layer of which every client has its own copy."""

    def __init__(
        self, spec: Linear, weight: Leaf, bias: Leaf | None, order: LockstepOrder, rows: Rows | None
    ) -> None:
        """A first layer gets the examples that are its inputs."""
        self.spec, self.weight, self.bias, self.rows = spec, weight, bias, rows
        self.order, self.t = order, 0
        self.end = self.mask = ""
        """As in ``dual``."""

    def forward(self, a: Tensor) -> Tensor:
        """[k, B, in] (of a first layer row numbers [k, B] of the examples) -> [k, B, out]."""
        self.counts, self.t = self.order.counts[self.t, : len(a)], self.t + 1
        self.given = a
        self.a = a = a if self.rows is None else taken(self.rows.flat, a)
        weight = self.weight.value[: len(a)].mT
        z = a.bmm(weight) if self.bias is None else self.bias.value[: len(a)].baddbmm(a, weight)
        return z.relu_() if self.end else z

    def backward(self, d: Tensor) -> Tensor:
        """[k, B, out] -> [k, B, in]; where a ReLU gave the inputs, the gradient of what that got."""
        t = d.bmm(self.weight.value[: len(d)])
        return masked(t, self.a) if self.mask else t

    def step(self, d: Tensor) -> None:
        """The step, fused into the product that would have been the gradient."""
        self.weight.step(d.mT, self.a)
        if self.bias is not None:
            self.bias.step(d.new_ones(1, 1, 1).expand(len(d), 1, d.shape[1]), d)

    def example_sq_norms(self, d: Tensor) -> Tensor:
        """Squared norm |d|^2 (|a|^2 + 1) of each example's own gradient d a^T, [k, B]; it is never built.

        In float64: squares vanish in float32, or lose a thousandth where a million of them are added up.
        """
        rows = self.rows
        lengths = self._sq_norms(self.a) if rows is None else rows.sq_lengths[self.given]
        return self._sq_norms(d) * (lengths + float(self.bias is not None))

    def _sq_norms(self, x: Tensor) -> Tensor:
        return exact_sq_norms(x.flatten(0, 1)).view(x.shape[:2])

    @property
    def closes(self) -> bool:
        """Whether, as the last layer, its whole step is better taken at once."""
        plain = not self.weight.rule.momentum and not self.weight.rule.pull
        plain = plain and all(
            leaf is None or leaf.shift is None for leaf in (self.weight, self.bias)
        )
        return plain and self.rows is None and self.weight.value[0].numel() <= CLOSING

    def stack(self) -> Stack:
        """The copies."""
        bias = None if self.bias is None else self.bias.value[:, 0]
        return self.spec.named(self.weight.value, bias)

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Of weight and bias together."""
        leaves = [self.weight, *([self.bias] if self.bias else [])]
        return torch.stack([squares(leaf.change(), upper) for leaf in leaves]).sum(0)

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """Of both."""
        bias = None if self.bias is None else self.bias.weighted_sum(weight)[0]
        return self.spec.named(self.weight.weighted_sum(weight), bias)


def sums(
    d: Tensor, a: Tensor, counts: np.ndarray, weight: Tensor, bias: Tensor | None
) -> Callable[[int], None]:
    """What writes a client's d^T a to ``weight`` [out, in], and the sum of its d to ``bias``, if any.

    For gradients of the outputs d [k, B, out] and inputs a [k, B, in], of which the first ``counts`` are
    examples.
    """
    # all clients' views by one call each: of the few rows of one a call costs as much as the product
    sizes = [n for count in counts.tolist() for n in (count, d.shape[1] - count)]
    columns = d.flatten(0, 1).T.split_with_sizes(sizes, 1)[::2]
    rows = a.flatten(0, 1).split_with_sizes(sizes)[::2]

    def write(k: int) -> None:
        torch.mm(columns[k], rows[k], out=weight)
        if bias is not None:
            torch.sum(columns[k], 1, out=bias)

    return write
