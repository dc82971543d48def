"""Linear layers of which every client has its own copy, and products of its few rows with it."""

import torch
from torch import Tensor

from fedtorch.fast.chunk_data import Rows, taken
from fedtorch.fast.layers import Leaf, squares
from fedtorch.fast.ops import Ops, masked
from fedtorch.fast.reader import Linear
from fedtorch.fast.schedule import LockstepOrder
from fedtorch.fast.tuning import CLOSING
from fedtorch.tree import exact_sq_norms
from fedtorch.types import Params, Stack


class Own:
    """A linear layer of which every client has its own copy."""

    def __init__(
        self,
        spec: Linear,
        weight: Leaf,
        bias: Leaf | None,
        order: LockstepOrder,
        rows: Rows | None,
        ops: Ops | None = None,
    ) -> None:
        """A first layer gets the examples that are its inputs; without ``ops`` products are torch's."""
        self.spec, self.weight, self.bias, self.rows = spec, weight, bias, rows
        self.ops = ops or Ops()
        self.order, self.t = order, 0
        self.end = self.mask = ""
        """As in ``dual``."""

    def forward(self, a: Tensor) -> Tensor:
        """[k, B, in] (of a first layer row numbers [k, B] of the examples) -> [k, B, out]."""
        self.counts, self.t = self.order.counts[self.t, : len(a)], self.t + 1
        self.given = a
        self.a = a = a if self.rows is None else taken(self.rows.flat, a)
        bias = None if self.bias is None else self.bias.value
        z = self.ops.outputs(a, self.weight.value, bias, self.counts)
        return z.relu_() if self.end else z

    def backward(self, d: Tensor) -> Tensor:
        """[k, B, out] -> [k, B, in]; where a ReLU gave the inputs, the gradient of what that got."""
        t = self.ops.inputs(d, self.weight.value, self.counts)
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
