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
    known = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
    return loops(LOOPS) if known else None


def remember(x: Tensor, X: Tensor, G: Tensor, s: int, one: float) -> None:
    """Write rows x [k, B, p] down in X [K, T, p] from s on, and their products with all so far in G.

    G is [K, T, T]; ``one`` is added to each product: a bias is an input that is always 1.
    """
    if fast := compiled(x):
        fast.products(x.contiguous().numpy(), X.numpy(), G.numpy(), s, one)
        return
    k, e = x.shape[0], s + x.shape[1]
    X[:k, s:e] = x
    G[:k, s:e, :e] = x.bmm(X[:k, :e].mT).add_(one)


def pairs(D: Tensor) -> Tensor:
    """Products of each two rows of D [K, n, q], [K, n, n], zero above the diagonal."""
    if fast := compiled(D):
        out = D.new_zeros(*D.shape[:2], D.shape[1])
        fast.pairs(D.numpy(), out.numpy())
        return out
    return D.bmm(D.mT).tril()


def subtract(z: Tensor, G: Tensor, Y: Tensor, s: int, n: int) -> Tensor:
    """The difference z [k, B, q] - G Y: rows from s on of G [K, T, ...], the first n of Y [K, ..., q]."""
    if fast := compiled(z):
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
        fast.less(z.contiguous().numpy(), out.numpy(), G.numpy(), Y.numpy(), s, n)
        return out
    k, B = z.shape[:2]
    return torch.baddbmm(z, G[:k, s : s + B, :n], Y[:k, :n], alpha=-1)


def add_rows(D: Tensor, place: Tensor, s: int, d: Tensor) -> None:
    """Add rows d [k, B, q] to those of D [K, n, q] that ``place`` [K, T] names from s on, of all K n."""
    flat = D.flatten(0, 1)
    if fast := compiled(d):
        fast.add_rows(flat.numpy(), place.numpy(), s, d.contiguous().numpy())
        return
    flat.index_add_(0, place[: len(d), s : s + d.shape[1]].flatten(), d.flatten(0, 1))
