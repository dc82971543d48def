"""Linear layers of which every client has its own copy, and products of its few rows with it.

Loops of ours do them where a tile of numbers fits a processor's registers, at up to twice a library's rate
for ten rows; with many rows, without numba, on accelerators and on other processors torch does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch.fast.chunk_data import taken
from fedtorch.fast.layers import Leaf, squares
from fedtorch.fast.ops import masked, tiles
from fedtorch.fast.schedule import Schedule
from fedtorch.fast.spec import Linear
from fedtorch.tree import exact_sq_norms
from fedtorch.types import Params, Stack

FEW = 16
"""Rows of a client, on average, up to which the loops are faster in both directions."""

LEAST = 8
"""Outputs the loops take at a time."""

NARROW = 16
"""Outputs from which on a library's product is faster than stepping row by row."""


class Own:
    """A linear layer of which every client has its own copy."""

    def __init__(
        self, spec: Linear, weight: Leaf, bias: Leaf | None, order: Schedule, data: Tensor | None
    ) -> None:
        """A first layer gets the ``data``, [N, in], of which its inputs are rows."""
        self.spec, self.weight, self.bias, self.data = spec, weight, bias, data
        self.order, self.t = order, 0
        few = order.usual <= FEW and spec.shape[0] >= LEAST
        fast = tiles(weight.value)
        values = weight.value, None if bias is None else bias.value
        self.products = Products(*values, fast if few else None)
        rule = weight.rule
        plain = not (rule.momentum or rule.pull or weight.shift is not None)
        self.narrow = plain and spec.shape[0] < NARROW and fast is not None and few
        self.end = self.mask = ""
        """As in ``dual``."""

    def forward(self, a: Tensor) -> Tensor:
        """[k, B, in] (or row numbers [k, B] of the data) -> [k, B, out]."""
        self.counts, self.t = self.order.counts[self.t, : len(a)], self.t + 1
        self.a = a = (a if self.data is None else taken(self.data, a)).contiguous()
        z = self.products.outputs(a, self.counts)
        return z.relu_() if self.end else z

    def backward(self, d: Tensor) -> Tensor:
        """[k, B, out] -> [k, B, in]."""
        return self.products.inputs(d, self.counts, self.a if self.mask else None)

    def step(self, d: Tensor) -> None:
        """The step, fused into the product that would have been the gradient."""
        if self.narrow:
            self.products.step(d, self.a, self.counts, self.weight.rule.keep)
            return
        self.weight.step(d.mT, self.a)
        if self.bias is not None:
            self.bias.step(d.new_ones(1, 1, 1).expand(len(d), 1, d.shape[1]), d)

    def example_sq_norms(self, d: Tensor) -> Tensor:
        """Squared norm of each example's own gradient d a^T, [K, B], which is never built."""
        return sq_norms(d, self.a, self.counts, 0.0 if self.bias is None else 1.0)

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


class Products:
    """Products of K clients' rows with their own weights.

    Of each client the first ``counts`` rows of a step are examples; what comes of the others is finite if
    they are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, fast: Any) -> None:
        """Weights [K, out, in] and biases [K, 1, out]; ``fast``: the loops, if they are to do it."""
        self.weight, self.bias, self.fast = weight, bias, fast
        if fast:
            none = weight.new_empty(len(weight), 1, 0)
            self.arrays = weight.numpy(), (none if bias is None else bias).numpy()

    def outputs(self, a: Tensor, counts: np.ndarray) -> Tensor:
        """Rows a [k, B, in] -> a W^T + b, [k, B, out]."""
        if self.fast:
            out = a.new_empty(*a.shape[:2], self.weight.shape[1])
            self.fast.outputs(a.numpy(), counts, *self.arrays, out.numpy())
            return out
        weight = self.weight[: len(a)].mT
        return a.bmm(weight) if self.bias is None else torch.baddbmm(self.bias[: len(a)], a, weight)

    def inputs(self, d: Tensor, counts: np.ndarray, a: Tensor | None = None) -> Tensor:
        """Gradients d [k, B, out] of the outputs -> those of the inputs, d W [k, B, in].

        ``a``: those inputs, where a ReLU put them out; the result is then the gradient of what it got.
        """
        if self.fast:
            out = d.new_empty(*d.shape[:2], self.weight.shape[2])
            by = out[:, :0] if a is None else a
            given = d.contiguous().numpy(), counts, self.arrays[0], by.numpy()
            self.fast.inputs(*given, out.numpy())
            return out
        t = d.bmm(self.weight[: len(d)])
        return t if a is None else masked(t, a)

    def step(self, d: Tensor, a: Tensor, counts: np.ndarray, keep: float) -> None:
        """Take d^T a, and the sum of d, off ``keep`` times weights and biases; with loops alone."""
        given = d.contiguous().numpy(), a.numpy(), counts
        self.fast.narrow_step(*given, keep, *self.arrays)


def sq_norms(d: Tensor, a: Tensor, counts: np.ndarray, extra: float) -> Tensor:
    """Squared norms |d|^2 (|a|^2 + extra) of gradients d [k, B, out] and inputs a [k, B, in], [k, B]."""
    # in float64: squares vanish in float32, or lose a thousandth where a million of them are added up
    if fast := tiles(d):
        out = np.empty(d.shape[:2])
        fast.sq_norms(d.contiguous().numpy(), a.contiguous().numpy(), counts, extra, out)
        return torch.from_numpy(out)
    lengths = exact_sq_norms(a.flatten(0, 1)).view(a.shape[:2])
    return exact_sq_norms(d.flatten(0, 1)).view(d.shape[:2]) * (lengths + extra)


def sums(
    d: Tensor, a: Tensor, counts: np.ndarray, weight: Tensor, bias: Tensor | None
) -> Callable[[int], None]:
    """What writes a client's d^T a to ``weight`` [out, in], and the sum of its d to ``bias``, if any.

    For gradients of the outputs d [k, B, out] and inputs a [k, B, in].
    """
    if fast := tiles(d):
        b = d.new_empty(0) if bias is None else bias
        given = d.contiguous().numpy(), a.contiguous().numpy(), counts
        into = weight.numpy(), b.numpy()
        return lambda k: fast.gradient(*given, k, *into)
    columns, rows = d.mT.unbind(), a.unbind()

    def write(k: int) -> None:
        some = columns[k][:, : counts[k]]
        torch.mm(some, rows[k][: counts[k]], out=weight)
        if bias is not None:
            torch.sum(some, 1, out=bias)

    return write
