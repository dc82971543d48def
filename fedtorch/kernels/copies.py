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
    q, some, one = np.uint64(out.shape[2]), counted(d.shape[2]), d.dtype.type(1)
    for c in range(len(d)):
        to, t, by = out[c].reshape(-1), np.uint64(0), (one, one)
        while t < q:  # a few columns of the weights for all rows: they stay in the first cache
            for i in range(0, counts[c], 2):
                other = min(i + 1, counts[c] - 1)
                at = np.uint64(i) * q + t, np.uint64(other) * q + t
                g, h = d[c, i], d[c, other]
                if t + W4 <= q:
                    less_four(to, at, to, at, g, h, w[c], t, q, some, by)
                else:
                    less_one(to, at, to, at, g, h, w[c], t, q, some, by, min(q - t, W))
            t += W4 if t + W4 <= q else W


@machine_code
def gradient(d: Any, a: Any, n: int, weight: Any, bias: Any) -> None:
    """Write d^T a of the first n rows to ``weight``, flat, and the sum of d to ``bias``, if it has any."""
    size, into = d.shape[1], a.shape[1]
    B, end, q, o = np.uint64(n), np.uint64(size), np.uint64(into), np.uint64(0)
    df, af = d.reshape(-1), a.reshape(-1)
    while o < end:
        whole, t = o + HIGH <= end, np.uint64(0)
        while t < q:
            m = W if t + WIDE <= q else min(q - t, W)
            if t + WIDE <= q and whole:
                block(weight, df, af, B, end, q, o, t, m)
            elif t + WIDE <= q:
                row(weight, df, af, B, end, q, o, t, m)
            elif whole:
                column(weight, df, af, B, end, q, o, t, m)
            else:
                rest(weight, df, af, B, end, q, o, t, m)
            t += WIDE if t + WIDE <= q else W
        o += HIGH if whole else np.uint64(1)
    if len(bias):
        for j in range(size):
            bias[j] = 0
        for i in range(n):
            for j in range(size):
                bias[j] += d[i, j]
