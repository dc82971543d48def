"""What the dual layers add to their large products: many small ones, a whole step of them in one call.

Ten rows against fifty are so little that a library spends as long on the call as on the numbers. Without
numba, and on accelerators, torch does the same.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch.kernels.compile import loops

LOOPS = "fedtorch.kernels.products"

TILES = "fedtorch.kernels.tiles"
"""Those that want sixteen registers for one sum."""


def compiled(like: Tensor) -> Any:
    """The loops, if they can be had for tensors like this one."""
    return loops(LOOPS) if known(like) else None


def tiles(like: Tensor) -> Any:
    """The loops, if they can be had for tensors like this one and a tile stays in registers."""
    fast = loops(TILES) if known(like) else None
    return fast if fast and fast.FITS else None


def known(like: Tensor) -> bool:
    """Whether a loop can work on such tensors."""
    return like.is_cpu and like.dtype in (torch.float32, torch.float64)


class Written:
    """Rows X [K, T, p] of a layer's clients, written down step by step, and what they take off rows Y.

    G [K, T, T] holds their products, which are 0 where a row was not there yet.
    """

    def __init__(self, X: Tensor, G: Tensor, Y: Tensor, one: float) -> None:
        """Y [K, T, q]; ``one`` is added to products: a bias is an input that is always 1."""
        self.X, self.G, self.Y, self.one = X, G, Y, one
        self.fast = compiled(X)
        self.arrays = (X.numpy(), G.numpy(), Y.numpy()) if self.fast else ()

    def __call__(self, z: Tensor, x: Tensor, s: int, keep: float = 1.0, end: str = "") -> Tensor:
        """Write rows x [k, B, p] down from s on, and return keep z - G Y [k, B, q] for the rows before.

        It takes z's memory. Of Y only rows before s are looked at, and with ``end`` "mask" those from s on:
        where they are not positive the result is 0. "relu" makes it 0 where it is negative.
        """
        if self.fast:
            given = z.numpy(), x.contiguous().numpy(), *self.arrays
            self.fast.corrected(*given, s, self.one, keep, self.fast.ENDS[end])
            return z
        k, e = x.shape[0], s + x.shape[1]
        self.X[:k, s:e] = x
        self.G[:k, s:e, :e] = x.bmm(self.X[:k, :e].mT).add_(self.one)
        before = self.G[:k, s:e, :s], self.Y[:k, :s]
        z = z.baddbmm_(*before, beta=keep, alpha=-1) if s else z
        return masked(z, self.Y[:k, s:e]) if end == "mask" else z.relu_() if end else z


class Coefficients:
    """A row of numbers for each example of K clients, all 0 at first: early steps meet few others.

    ``rows`` [K, m, q]. In a step the examples named by ``local`` put out z - G rows.
    """

    def __init__(self, z: Tensor, G: Tensor, places: tuple[Tensor, Tensor]) -> None:
        """Outputs z [N, q] for all clients' examples, and G [K, n, m] for each client's own.

        ``places``: the examples of each step, [K, T], as rows of z and as rows of the client's G.
        """
        (K, _, m), (self.index, self.local) = G.shape, places
        self.z, self.G, self.rows = z, G, z.new_zeros(K, m, z.shape[1])
        self.seen, self.many = np.zeros((K, m), np.int64), np.zeros(K, np.int64)
        """Which rows are not all 0, in the order in which they came, and how many."""
        self.marks = np.zeros((K, m), np.bool_)
        self.fast = compiled(z)
        if self.fast:
            self.places = self.local.numpy(), self.rows.numpy()
            self.given = z.numpy(), self.index.numpy(), G.numpy()

    def outputs(
        self, s: int, k: int, B: int, keep: float = 1.0, rate: float = 1.0, end: str = ""
    ) -> Tensor:
        """Of B rows from s on of the first k clients: keep z - rate G rows, [k, B, q].

        ``end`` "relu": 0 where that is negative.
        """
        if self.fast:
            out = self.z.new_empty(k, B, self.z.shape[1])
            known = *self.given, *self.places, self.seen, self.many
            self.fast.less(*known, s, (keep, rate, self.fast.ENDS[end]), out.numpy())
            return out
        at = slice(s, s + B)
        own = self.G.take_along_dim(self.local[:, at, None], 1)[:k]
        z = self.z[self.index[:k, at]]
        z = torch.baddbmm(z, own, self.rows[:k], beta=keep, alpha=-rate)
        return z.relu_() if end else z

    def add(self, s: int, d: Tensor) -> None:
        """Add rows d [k, B, q] to those of the examples from s on."""
        if self.fast:
            known = self.seen, self.many, self.marks
            local, rows = self.places
            self.fast.add_rows(rows, local, s, d.contiguous().numpy(), *known)
            return
        at = self.local[: len(d), s : s + d.shape[1], None].expand_as(d)
        self.rows[: len(d)].scatter_add_(1, at, d)

    def count_all(self, k: int) -> None:
        """Of the first k clients any row may be something else than 0 from now on."""
        m = self.seen.shape[1]
        self.seen[:k], self.many[:k], self.marks[:k] = np.arange(m), m, True


def masked(d: Tensor, a: Tensor) -> Tensor:
    """The gradient of a ReLU that put out ``a``, in d's memory."""
    torch.ops.aten.threshold_backward.grad_input(d, a, 0, grad_input=d)
    return d


def weighed(D: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Clients' rows D [K, n, q] -> -weight[k] D[k] and their sum [q]; a weight of 0 makes 0 of anything."""
    if fast := compiled(D):
        out, total = torch.empty_like(D), D.new_empty(D.shape[2])
        fast.weighed(D.numpy(), weight.numpy(), out.numpy(), total.numpy())
        return out, total
    out = torch.where(weight[:, None, None] != 0, D * -weight[:, None, None], 0)
    return out, out.sum((0, 1))


def turned(x: Tensor) -> Tensor:
    """The transpose of [p, q], row by row."""
    fast = tiles(x)
    if fast and min(x.shape) >= fast.WIDTH and x.is_contiguous():
        out = x.new_empty(x.shape[1], x.shape[0])
        fast.turn(x.numpy(), out.numpy())
        return out
    return x.T.contiguous()


def spans(D: Tensor, G: Tensor) -> Tensor:
    """Squared norms of D^T X, [K], for rows D [K, n, q] and X X^T = G [K, n, n].

    The norm is the sum of (X X^T) * (D D^T).
    """
    if fast := compiled(D):
        norms = D.new_empty(len(D), dtype=torch.float64)
        fast.spans(D.numpy(), G.numpy(), norms.numpy())
        return norms
    return (G * D.bmm(D.mT)).sum((1, 2))
