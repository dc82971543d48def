"""What ``fedtorch.fast.ops`` does by torch, by compiled loops; imported where numba is installed alone."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch.kernels import clips, copies
from fedtorch.kernels.closing import step
from fedtorch.kernels.products import ENDS, add_rows, corrected, less
from fedtorch.kernels.sparse import compress, sparse_product
from fedtorch.kernels.visits import behind, moved, visits

LINE = 16
"""Numbers of float32 on a cache line."""
BLOCK = 128
"""Columns whose rows of the other matrix stay in a core's first cache."""


class Coefficients:
    """Rows of which only those that are not all 0 are looked at."""

    def __init__(self, z: Tensor, G: Tensor, places: tuple[Tensor, Tensor]) -> None:
        """As in ``ops``."""
        K, m = len(G), G.shape[2]
        self.rows = z.new_zeros(K, m, z.shape[1])
        self.like, self.local = z, places[1].numpy()
        self.given = z.numpy(), places[0].numpy(), G.numpy(), self.local, self.rows.numpy()
        self.seen, self.many = np.zeros((K, m), np.int64), np.zeros(K, np.int64)
        """Which rows are not all 0, in the order in which they came, and how many."""
        self.marks = np.zeros((K, m), np.bool_)
        self.known = *self.given, self.seen, self.many, self.marks

    def outputs(
        self, s: int, k: int, B: int, keep: float = 1.0, rate: float = 1.0, end: str = ""
    ) -> Tensor:
        """As in ``ops``."""
        out = self.like.new_empty(k, B, self.like.shape[1])
        less(*self.given, self.seen, self.many, s, (keep, rate, ENDS[end]), out.numpy())
        return out

    def add(self, s: int, d: Tensor) -> None:
        """As in ``ops``."""
        known = self.seen, self.many, self.marks
        add_rows(self.given[4], self.local, s, d.contiguous().numpy(), *known)

    def count_all(self, k: int) -> None:
        """As in ``ops``."""
        m = self.seen.shape[1]
        self.seen[k], self.many[k], self.marks[k] = np.arange(m), m, True


class Clips:
    """As in ``ops``."""

    def __init__(
        self,
        layers: np.ndarray,
        inputs: tuple[Tensor, ...],
        given: tuple[Tensor, Tensor],
        most: int,
        first: tuple[Any, float] | None = None,
    ) -> None:
        """As ``ops.Ops.clips`` has it."""
        self.layers, self.inputs = layers, tuple(t.numpy() for t in inputs)
        self.first = first and (first[0].known, self.inputs[2], first[1])
        self.y, self.losses = (t.numpy() for t in given)
        like = given[1]
        taken, put = (int(layers[:, n].sum()) for n in (1, 0))
        put += int(layers[0, 1]) if first else 0
        own = (like.new_empty(most * size).numpy() for size in (taken, put))
        self.room = *own, np.empty(most), like.new_empty(most).numpy()

    def sums(self, own: Tensor, k: int, s: int, n: int, clip: float, into: Tensor) -> None:
        """As in ``ops``."""
        given = self.y, self.losses, (k, s, n), self.room, clip, into.numpy()
        if self.first:
            clips.behind(own.numpy(), self.layers, self.first, *given)
        else:
            clips.clipped(own.numpy(), self.layers, self.inputs, *given)

    def moved(self, own: Tensor, start: Tensor) -> float:
        """As in ``ops``."""
        values = own.numpy()
        return float(moved(values, start.numpy(), values))


class Loops:
    """The operations for tensors of float32 or float64 on a CPU."""

    def append(
        self,
        z: Tensor,
        x: Tensor,
        known: tuple[Tensor, Tensor, Tensor],
        s: int,
        one: float,
        keep: float = 1.0,
        end: str = "",
    ) -> Tensor:
        """As in ``ops``."""
        X, G, Y = (t.numpy() for t in known)
        corrected(z.numpy(), x.contiguous().numpy(), X, G, Y, s, one, keep, ENDS[end])
        return z

    def coefficients(self, z: Tensor, G: Tensor, places: tuple[Tensor, Tensor]) -> Coefficients:
        """As in ``ops``."""
        return Coefficients(z, G, places)

    def closing(
        self,
        a: Tensor,
        layer: tuple[Tensor, Tensor | None],
        given: tuple[Tensor, Tensor, Tensor, Tensor],
        s: int,
        keep: float,
        end: str,
    ) -> Tensor:
        """As in ``ops``."""
        (weight, bias), (y, scale, factor, losses) = layer, (t.numpy() for t in given)
        own = weight.numpy(), (weight[:0, :1] if bias is None else bias).numpy()
        out = torch.empty_like(a, memory_format=torch.contiguous_format)
        by = keep, ENDS[end]
        step(a.contiguous().numpy(), own, (y, scale), factor, losses, s, by, out.numpy())
        return out

    def outputs(self, a: Tensor, weight: Tensor, bias: Tensor | None, counts: np.ndarray) -> Tensor:
        """As in ``ops``."""
        out = a.new_zeros(*a.shape[:2], weight.shape[1])
        own = (
            weight.view(len(weight), -1).numpy(),
            (weight[:0, :1] if bias is None else bias).numpy(),
        )
        copies.outputs(a.contiguous().numpy(), *own, counts, out.numpy())
        return out

    def inputs(self, d: Tensor, weight: Tensor, counts: np.ndarray) -> Tensor:
        """As in ``ops``."""
        out = d.new_zeros(*d.shape[:2], weight.shape[2])
        own = weight.view(len(weight), -1).numpy()
        copies.inputs(d.contiguous().numpy(), own, counts, out.numpy())
        return out

    def sums(
        self, d: Tensor, a: Tensor, counts: np.ndarray, weight: Tensor, bias: Tensor | None
    ) -> Callable[[int], None]:
        """As in ``ops``."""
        ds, inputs = d.contiguous().numpy(), a.contiguous().numpy()
        into = weight.view(-1).numpy(), (weight.new_empty(0) if bias is None else bias).numpy()
        shapes = [(n, d.shape[2], a.shape[2]) for n in counts.tolist()]

        def write(k: int) -> None:
            copies.gradient(ds[k].reshape(-1), inputs[k].reshape(-1), shapes[k], *into)

        return write

    def visits(
        self,
        own: tuple[Tensor, Tensor, float],
        places: tuple[np.ndarray, int, int],
        inputs: tuple[Tensor, Tensor],
        given: tuple[Tensor, Tensor, Tensor],
        steps: tuple[Tensor, int],
    ) -> tuple[Tensor, Tensor]:
        """As in ``ops``."""
        (values, start, keep), (x, index), (layers, _, _) = own, inputs, places
        room, losing, (many, B), sums = prepared(values, start, places, given, steps)
        rows, by = (x.numpy(), index.numpy()), (B, keep, start.numpy())
        visits(values.numpy(), layers, rows, losing, many, by, room, sums)
        return torch.from_numpy(sums[0]), torch.from_numpy(sums[1])

    def behind(
        self,
        own: tuple[Tensor, Tensor],
        places: tuple[np.ndarray, int, int],
        first: Coefficients,
        given: tuple[Tensor, Tensor, Tensor],
        steps: tuple[Tensor, int],
    ) -> tuple[Tensor, Tensor]:
        """As in ``ops``."""
        (values, start), (layers, _, _) = own, places
        room, losing, (many, B), sums = prepared(values, start, places, given, steps)
        behind(values.numpy(), layers, first.known, losing, many, (B, start.numpy()), room, sums)
        return torch.from_numpy(sums[0]), torch.from_numpy(sums[1])

    clips = Clips

    def sparse(self, x: Tensor, most: float) -> "Sparse | None":
        """As in ``ops``."""
        return compressed(x) if x.numel() < 2**32 and filled(x) < most else None


@dataclass(frozen=True)
class Sparse:
    """A matrix [N, n] without its zeros, in blocks of columns, and in each of them row by row.

    Pixels of digits, words of a page, one-hot columns: of an MNIST image a fifth is not 0. A library
    multiplies the zeros too, at twice the rate at which what is left can be gathered.
    """

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
        self.add_to(out, dense)
        return out

    def add_to(self, out: Tensor, dense: Tensor) -> None:
        """Number after number: two products that follow each other add up as one of both."""
        runs = self.blocks, self.rows, self.starts, self.columns, self.values
        sparse_product(out.numpy(), *runs, dense.contiguous().numpy())


def compressed(x: Tensor) -> Sparse:
    """What is not 0 in [N, n]."""
    N, blocks, numbers = len(x), -(-x.shape[1] // BLOCK), filled(x)
    # unsigned places need no look at whether they count from the end; and one more of each is written on
    begin, rows, starts, columns = (
        np.empty(size + 1, np.uint32) for size in (blocks, N * blocks, N * blocks, numbers)
    )
    values = x.new_empty(numbers + 1).numpy()
    runs = compress(x.contiguous().numpy(), BLOCK, begin, rows, starts, columns, values)
    return Sparse(N, begin, rows[:runs], starts[: runs + 1], columns[:numbers], values[:numbers])


def prepared(
    values: Tensor,
    start: Tensor,
    places: tuple[np.ndarray, int, int],
    given: tuple[Tensor, Tensor, Tensor],
    steps: tuple[Tensor, int],
) -> tuple[Any, Any, tuple[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """Room for a client's visit, arrays of ``given`` and ``steps``, and where sums are written."""
    (_, taken, widest), (many, B), K = places, steps, len(values)
    room = parts(start, [len(start), B * taken, B * widest, B * widest])
    room += (np.empty(widest, np.uint64),)
    return room, tuple(t.numpy() for t in given), (many.numpy(), B), (np.empty(K), np.empty(K))


def parts(like: Tensor, sizes: list[int]) -> tuple[np.ndarray, ...]:
    """Room for so many numbers each, on cache lines of their own."""
    ends = [0, *accumulate(n + -n % LINE for n in sizes)]
    whole = like.new_empty(ends[-1]).numpy()
    return tuple(whole[i : i + n] for i, n in zip(ends, sizes, strict=False))


def filled(x: Tensor) -> int:
    """Numbers that are not 0; as bools they are counted in a fifth of the time."""
    return int(x.bool().sum())
