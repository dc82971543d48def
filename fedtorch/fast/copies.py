"""Linear layers of which every client has its own copy, and products of its few rows with it.

Loops of ours do them where a tile of numbers fits a processor's registers, at up to twice a library's rate
for ten rows; with many rows, without numba, on accelerators and on other processors torch does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch.compiled import loops
from fedtorch.fast.layers import Leaf, squares, vanishing
from fedtorch.fast.rows import taken
from fedtorch.fast.schedule import Schedule
from fedtorch.fast.small import known
from fedtorch.fast.spec import Linear
from fedtorch.types import Params, Stack

LOOPS = "fedtorch.fast.tiles"

FEW = 16
"""Rows of a client, on average, up to which the loops are faster in both directions."""


class Own:
    """A linear layer of which every client has its own copy."""

    def __init__(
        self, spec: Linear, weight: Leaf, bias: Leaf | None, order: Schedule, data: Tensor | None
    ) -> None:
        """A first layer gets the ``data``, [N, in], of which its inputs are rows."""
        self.spec, self.weight, self.bias, self.data = spec, weight, bias, data
        self.order, self.t = order, 0

    def forward(self, a: Tensor) -> Tensor:
        """[k, B, in] (or row numbers [k, B] of the data) -> [k, B, out]."""
        k = len(a)
        self.counts, self.t = self.order.counts[self.t][:k], self.t + 1
        self.a = a = a if self.data is None else taken(self.data, a)
        bias = None if self.bias is None else self.bias.value[:k]
        return outputs(a, self.weight.value[:k], bias, self.counts)

    def backward(self, d: Tensor) -> Tensor:
        """[k, B, out] -> [k, B, in]."""
        return inputs(d, self.weight.value[: len(d)], self.counts)

    def step(self, d: Tensor) -> None:
        """The step, fused into the product that would have been the gradient."""
        self.weight.step(d.mT, self.a)
        if self.bias is not None:
            self.bias.step(d.new_ones(1, 1, 1).expand(len(d), 1, d.shape[1]), d)

    def example_sq_norms(self, d: Tensor) -> Tensor:
        """Squared norm of each example's own gradient d a^T, [K, B], which is never built."""
        return sq_norms(d, self.a, self.counts, vanishing(self.a) if self.bias is None else 1.0)

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


def outputs(a: Tensor, weight: Tensor, bias: Tensor | None, counts: Sequence[int]) -> Tensor:
    """Rows a [k, B, in] times weights [k, out, in], plus bias [k, 1, out] -> [k, B, out].

    Of each client the first ``counts`` rows count; what comes of the others is finite if they are.
    """
    if fast := few(a, weight, counts):
        out = a.new_empty(*a.shape[:2], weight.shape[1])
        b = a.new_empty(len(a), 0) if bias is None else bias[:, 0]
        given = a.contiguous().numpy(), np.array(counts), weight.numpy(), b.numpy()
        fast.outputs(*given, out.numpy())
        return out
    return a.bmm(weight.mT) if bias is None else torch.baddbmm(bias, a, weight.mT)


def inputs(d: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Gradients d [k, B, out] of the outputs -> those of the inputs, [k, B, in]."""
    if fast := few(d, weight, counts):
        out = d.new_empty(*d.shape[:2], weight.shape[2])
        fast.inputs(d.contiguous().numpy(), np.array(counts), weight.numpy(), out.numpy())
        return out
    return d.bmm(weight)


def sq_norms(d: Tensor, a: Tensor, counts: Sequence[int], extra: float) -> Tensor:
    """Squared norms |d|^2 (|a|^2 + extra) of gradients d [k, B, out] and inputs a [k, B, in], [k, B]."""
    # in float64: a small gradient's square vanishes in float32, and what its input makes of it with it
    if fast := tiles(d):
        out = np.empty(d.shape[:2])
        fast.sq_norms(d.contiguous().numpy(), a.contiguous().numpy(), np.array(counts), extra, out)
        return torch.from_numpy(out)
    return d.double().square().sum(2) * (a.square().sum(2) + extra)


def sums(
    d: Tensor, a: Tensor, counts: Sequence[int], weight: Tensor, bias: Tensor | None
) -> Callable[[int], None]:
    """What writes a client's d^T a to ``weight`` [out, in], and the sum of its d to ``bias``, if any.

    For gradients of the outputs d [k, B, out] and inputs a [k, B, in].
    """
    if fast := tiles(d):
        b = d.new_empty(0) if bias is None else bias
        given = d.contiguous().numpy(), a.contiguous().numpy(), np.array(counts)
        into = weight.numpy(), b.numpy()
        return lambda k: fast.gradient(*given, k, *into)
    columns, rows = d.mT.unbind(), a.unbind()

    def write(k: int) -> None:
        some = columns[k][:, : counts[k]]
        torch.mm(some, rows[k][: counts[k]], out=weight)
        if bias is not None:
            torch.sum(some, 1, out=bias)

    return write


def few(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Any:
    """The loops, if they are the faster way for so many rows and such weights."""
    if sum(counts) > FEW * len(counts) or weight.shape[1] < 8:
        return None
    return tiles(rows)


def tiles(like: Tensor) -> Any:
    """The loops, if they can be had for tensors like this one and a tile stays in registers."""
    fast = loops(LOOPS) if known(like) else None
    return fast if fast and fast.FITS else None
