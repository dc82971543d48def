"""Products of all clients' rows with one matrix that they share: most of the arithmetic of the dual form.

A loop of ours keeps ten rows' sums in registers, beside sixteen columns of the matrix laid out one after
another once a visit. It runs at a sixth more than the library's rate, and for small matrices at twice that.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedtorch.fast.ops import tiles, turned

LARGE = 1 << 23
"""Multiplications from which on a product is worth the way to bfloat16 and back, or several threads."""

TALL = 600
"""Rows of a product at a time: with thousands at once the library is a sixth slower."""


def large(rows: int, weight: Tensor) -> bool:
    """Whether a product of so many rows and this weight is."""
    return rows * weight.numel() >= LARGE


class Shared:
    """A weight [q, p] and a bias [q], if there is one, by which [..., p] are multiplied again and again."""

    def __init__(self, weight: Tensor, bias: Tensor | None, half: bool = False) -> None:
        """``half``: in bfloat16 where that is worth it."""
        self.weight, self.bias = weight, bias
        self.half = half
        self.fast = tiles(weight)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """What the loop reads: sixteen columns after sixteen, and the bias, empty where there is none."""
        q, p = self.weight.shape
        width = self.fast.WIDTH
        panels = self.weight.new_empty(-(-q // width), p, width)
        self.fast.panels(turned(self.weight).numpy(), panels.numpy())
        bias = self.weight.new_empty(0) if self.bias is None else self.bias.contiguous()
        return panels.numpy(), bias.numpy()

    @cached_property
    def wide(self) -> Tensor:
        """The weight in bfloat16."""
        return self.weight.bfloat16()

    def __call__(self, a: Tensor) -> Tensor:
        """[..., p] -> [..., q]."""
        rows = a.flatten(0, -2)
        much = large(len(rows), self.weight)
        if self.half and much:
            out = (rows.bfloat16() @ self.wide.T).float()
            out = out if self.bias is None else out.add_(self.bias)
        elif self._loops(len(rows)) and (not much or torch.get_num_threads() == 1):
            out = rows.new_empty(len(rows), len(self.weight))
            self.fast.shared(rows.contiguous().numpy(), *self.arrays, out.numpy())
        else:
            out = self._by_library(rows)
        return out.view(*a.shape[:-1], len(self.weight))

    def _loops(self, rows: int) -> bool:
        return self.fast is not None and rows >= self.fast.TEN

    def _by_library(self, rows: Tensor) -> Tensor:
        if len(rows) < 2 * TALL:
            turned = self.weight.T
            return rows @ turned if self.bias is None else torch.addmm(self.bias, rows, turned)
        out = rows.new_empty(len(rows), len(self.weight))
        for some, into in zip(rows.split(TALL), out.split(TALL), strict=True):
            torch.mm(some, self.weight.T, out=into)
        return out if self.bias is None else out.add_(self.bias)
