"""Products with examples of which most numbers are 0: pixels of digits, words of a page, one-hot columns.

Of an MNIST image a fifth is not 0. A matrix library multiplies the zeros too, at twice the rate at which
what is left can be gathered; so below two fifths this is the faster way.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedtorch.fast.ops import known
from fedtorch.kernels.compile import loops

LOOPS = "fedtorch.kernels.sparse"

RATE = 2.5
"""How much faster a product with zeros and all is, for each number in it."""

BLOCK = 128
"""Columns whose rows of the other matrix stay in a core's first cache."""


@dataclass(frozen=True)
class Sparse:
    """A matrix [N, n] without its zeros, in blocks of columns, and in each of them row by row."""

    height: int
    blocks: np.ndarray
    """Which run each block begins with, and how many there are."""
    rows: np.ndarray
    """Of each run of numbers of one row and one block, [runs]."""
    starts: np.ndarray
    """Where a run begins, and the last one ends, [runs + 1]."""
    columns: np.ndarray
    values: np.ndarray

    def times(self, dense: Tensor, start: Tensor | None = None) -> Tensor:
        """The product with [n, q], [N, q]; ``start`` [q] is added to each row."""
        size = self.height, dense.shape[1]
        out = dense.new_zeros(size) if start is None else start.repeat(self.height, 1)
        runs = self.blocks, self.rows, self.starts, self.columns, self.values
        loops(LOOPS).sparse_product(out.numpy(), *runs, dense.contiguous().numpy())
        return out


def sparse(x: Tensor) -> Sparse:
    """What is not 0 in [N, n]."""
    N, blocks, numbers = len(x), -(-x.shape[1] // BLOCK), filled(x)
    # unsigned places need no look at whether they count from the end; and one more of each is written on
    begin, rows, starts, columns = (
        np.empty(size + 1, np.uint32) for size in (blocks, N * blocks, N * blocks, numbers)
    )
    values = x.new_empty(numbers + 1).numpy()
    runs = loops(LOOPS).compress(
        x.contiguous().numpy(), BLOCK, begin, rows, starts, columns, values
    )
    return Sparse(N, begin, rows[:runs], starts[: runs + 1], columns[:numbers], values[:numbers])


def filled(x: Tensor) -> int:
    """Numbers that are not 0; as bools they are counted in a fifth of the time."""
    return int(x.bool().sum())


def pays(x: Tensor, columns: int) -> bool:
    """Whether it is the faster way, for a product that would else be one with so many ``columns``."""
    if not known(x):
        return False
    few = x.numel() < 2**32 and filled(x) * RATE < len(x) * columns
    return few and loops(LOOPS) is not None
