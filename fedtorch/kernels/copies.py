"""Products of each client's few rows with weights of its own, of those rows alone that are examples.

A library multiplies them in one call for all clients, filled up to the widest batch, or in a call each.
Only to be imported where numba is installed. Matrices are flat, with places counted in numbers.
"""

from typing import Any

import numpy as np

from fedtorch.kernels.compile import machine_code
from fedtorch.kernels.products import W4, W, counted, less_four, less_one, row_products
from fedtorch.kernels.tiles import ACROSS, ROWS, outer
from fedtorch.kernels.vector import WIDTH

WIDE, HIGH = np.uint64(ACROSS * WIDTH), np.uint64(ROWS)
block, column = outer(ROWS, ACROSS), outer(ROWS, 1)
row, rest = outer(1, ACROSS), outer(1, 1)


@machine_code
def outputs(a: Any, w: Any, bias: Any, counts: Any, out: Any) -> None:
    """What ``ops.outputs`` does; ``w`` [K, numbers]; ``bias``: none or [K, 1, q].

    Rows that are no examples are left alone.
    """
    q, size = np.uint64(a.shape[2]), out.shape[2]
    for c in range(len(a)):
        n, to = counts[c], out[c].reshape(-1)
        row_products(a[c].reshape(-1), w[c], q, (n, size), to, (0, size), a.dtype.type(0))
        if len(bias):
            for i in range(n):
                for j in range(size):
                    to[i * size + j] += bias[c, 0, j]


@machine_code
def inputs(d: Any, w: Any, counts: Any, out: Any) -> None:
    """What ``ops.inputs`` does; ``w`` [K, numbers]; ``out`` begins as zeros."""
    for c in range(len(d)):
        shape = counts[c], d.shape[2], out.shape[2]
        down(d[c].reshape(-1), w[c], shape, out[c].reshape(-1))


@machine_code
def down(d: Any, w: Any, shape: Any, out: Any) -> None:
    """Add d w to ``out``, for the first n rows of d [B, size] and w [size, into]; ``shape``: the three."""
    (n, size, into), one = shape, d.dtype.type(1)
    q, some, t = np.uint64(into), counted(size), np.uint64(0)
    while t < q:  # a few columns of the weights for all rows: they stay in the first cache
        for i in range(0, n, 2):
            other = min(i + 1, n - 1)
            at = np.uint64(i) * q + t, np.uint64(other) * q + t
            g, h = d[i * size : (i + 1) * size], d[other * size : (other + 1) * size]
            if t + W4 <= q:
                less_four(out, at, out, at, g, h, w, t, q, some, (one, one))
            else:
                less_one(out, at, out, at, g, h, w, t, q, some, (one, one), min(q - t, W))
        t += W4 if t + W4 <= q else W


@machine_code
def gradient(d: Any, a: Any, shape: Any, weight: Any, bias: Any) -> None:
    """Write d^T a to ``weight``, and the sum of d to ``bias``, if it has any; ``shape`` as above."""
    n, size, into = shape
    B, end, q, o = np.uint64(n), np.uint64(size), np.uint64(into), np.uint64(0)
    while o < end:
        whole, t = o + HIGH <= end, np.uint64(0)
        while t < q:
            m = W if t + WIDE <= q else min(q - t, W)
            if t + WIDE <= q and whole:
                block(weight, d, a, B, end, q, o, t, m)
            elif t + WIDE <= q:
                row(weight, d, a, B, end, q, o, t, m)
            elif whole:
                column(weight, d, a, B, end, q, o, t, m)
            else:
                rest(weight, d, a, B, end, q, o, t, m)
            t += WIDE if t + WIDE <= q else W
        o += HIGH if whole else np.uint64(1)
    if len(bias):
        for j in range(size):
            bias[j] = 0
        for i in range(n):
            for j in range(size):
                bias[j] += d[i * size + j]
