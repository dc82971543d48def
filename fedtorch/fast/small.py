"""What the dual layers add to their large products: many small ones, a whole step of them in one call.

Ten rows against fifty are so little that a library spends as long on the call as on the numbers. Without
numba, and on accelerators, torch does the same.
"""

from typing import Any

import torch
from torch import Tensor

from fedtorch.compiled import loops

LOOPS = "fedtorch.fast.kernels"


def compiled(like: Tensor) -> Any:
    """The loops, if they can be had for tensors like this one."""
    return loops(LOOPS) if known(like) else None


def known(like: Tensor) -> bool:
    """Whether a loop can work on such tensors."""
    return like.is_cpu and like.dtype in (torch.float32, torch.float64)


def corrected(z: Tensor, x: Tensor, X: Tensor, G: Tensor, Y: Tensor, s: int, one: float) -> Tensor:
    """A step of a layer whose clients' rows before this one's are X [K, T, p] and Y [K, T, q], up to s.

    Rows x [k, B, p] are written down in X from s on, and their products with all so far, plus ``one``, in
    G [K, T, T]: a bias is an input that is always 1. Returns z [k, B, q] less their products with rows
    before s times Y, in z's memory.
    """
    if fast := compiled(z):
        given = x.contiguous().numpy(), X.numpy(), G.numpy(), Y.numpy()
        fast.corrected(z.numpy(), *given, s, one)
        return z
    k, e = x.shape[0], s + x.shape[1]
    X[:k, s:e] = x
    G[:k, s:e, :e] = x.bmm(X[:k, :e].mT).add_(one)
    return z.baddbmm_(G[:k, s:e, :s], Y[:k, :s], alpha=-1) if s else z


def pairs(D: Tensor) -> Tensor:
    """Products of each two rows of D [K, n, q], [K, n, n], zero above the diagonal."""
    if fast := compiled(D):
        out = D.new_zeros(*D.shape[:2], D.shape[1])
        fast.pairs(D.numpy(), out.numpy())
        return out
    return D.bmm(D.mT).tril()


def subtract(z: Tensor, begin: int, a: Tensor, G: Tensor, Y: Tensor, s: int) -> Tensor:
    """Rows of z [K, ..., q] from ``begin`` on, less those of G [K, T, n] from s on times Y [K, n, q].

    For as many clients and rows as ``a`` [k, B] has, [k, B, q].
    """
    k, B = a.shape[:2]
    if fast := compiled(z):
        out = z.new_empty(k, B, z.shape[2])
        fast.less(z.numpy(), begin, out.numpy(), G.numpy(), Y.numpy(), s, G.shape[2])
        return out
    return torch.baddbmm(z[:k, begin : begin + B], G[:k, s : s + B], Y[:k], alpha=-1)


def add_rows(D: Tensor, place: Tensor, s: int, d: Tensor) -> None:
    """Add rows d [k, B, q] to those of D [K, n, q] that ``place`` [K, T] names from s on, of all K n."""
    flat = D.flatten(0, 1)
    if fast := compiled(d):
        fast.add_rows(flat.numpy(), place.numpy(), s, d.contiguous().numpy())
        return
    flat.index_add_(0, place[: len(d), s : s + d.shape[1]].flatten(), d.flatten(0, 1))
