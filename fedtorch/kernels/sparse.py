"""Compiled loops over what is not 0 in a matrix; only to be imported where numba is installed.

A row of the result stays in registers while what is not 0 in a row of the matrix is gone through.
"""

from typing import Any

import numpy as np

from fedtorch.kernels.compile import machine_code
from fedtorch.kernels.vector import WIDTH, load, load_some, scaled, store, store_some

W = np.uint64(WIDTH)
W2, W3, W4 = np.uint64(2 * WIDTH), np.uint64(3 * WIDTH), np.uint64(4 * WIDTH)


@machine_code
def compress(
    x: Any, width: int, blocks: Any, rows: Any, starts: Any, columns: Any, values: Any
) -> int:
    """Write what is not 0 in x [N, n] as ``loops.Sparse`` has it, in blocks so wide; returns the runs."""
    N, n = x.shape
    k = runs = np.uint64(0)
    last = np.uint64(len(values) - 1)  # whoever counted may have taken a number this small for 0
    for b in range(len(blocks) - 1):
        blocks[b] = runs
        for i in range(N):
            first = k
            for j in range(b * width, min(n, (b + 1) * width)):
                columns[k], values[k] = j, x[i, j]  # to be written over by the next one if it is 0
                k = min(k + np.uint64(x[i, j] != 0), last)
            rows[runs], starts[runs] = i, first
            runs += np.uint64(k > first)
    blocks[len(blocks) - 1], starts[runs] = runs, k
    return int(runs)


@machine_code
def sparse_product(
    out: Any, blocks: Any, rows: Any, starts: Any, columns: Any, values: Any, dense: Any
) -> None:
    """Add to out [N, q] the matrix of ``loops.Sparse`` times dense [n, q]."""
    q = np.uint64(out.shape[1])
    of, df = out.reshape(-1), dense.reshape(-1)
    for block in range(len(blocks) - 1):
        t = np.uint64(0)
        while t < q:
            left = q - t
            wide, m = left >= W4, min(left - W4 if left >= W4 else left, W)
            more = wide and m > 0 and m == left - W4  # a fifth register spares a round of its own
            for s in range(blocks[block], blocks[block + 1]):
                at, first, last = np.uint64(rows[s]) * q + t, starts[s], starts[s + 1]
                if wide:
                    a, b = load(of, at), load(of, at + W)
                    c, d = load(of, at + W2), load(of, at + W3)
                    if more:
                        e = load_some(of, at + W4, m)
                        for j in range(first, last):
                            v, r = values[j], np.uint64(columns[j]) * q + t
                            a, b = scaled(a, v, load(df, r)), scaled(b, v, load(df, r + W))
                            c, d = scaled(c, v, load(df, r + W2)), scaled(d, v, load(df, r + W3))
                            e = scaled(e, v, load_some(df, r + W4, m))
                        store_some(of, at + W4, m, e)
                    else:
                        for j in range(first, last):
                            v, r = values[j], np.uint64(columns[j]) * q + t
                            a, b = scaled(a, v, load(df, r)), scaled(b, v, load(df, r + W))
                            c, d = scaled(c, v, load(df, r + W2)), scaled(d, v, load(df, r + W3))
                    store(of, at, a)
                    store(of, at + W, b)
                    store(of, at + W2, c)
                    store(of, at + W3, d)
                else:
                    a = load_some(of, at, m)
                    for j in range(first, last):
                        r = np.uint64(columns[j]) * q + t
                        a = scaled(a, values[j], load_some(df, r, m))
                    store_some(of, at, m, a)
            t += (W4 + m if more else W4) if wide else W
