"""Loops of the fast path that are compiled; only to be imported where numba is installed.

Sums stay in registers: two rows at a time against four registers, or four rows, of the other matrix, which
is as much as an AVX-512 processor can keep busy with. Matrices are flat, with places counted in numbers.
"""

import math
from typing import Any

import numpy as np

from fedtorch.compiled import machine_code
from fedtorch.lanes import (
    WIDTH,
    added,
    load,
    load_some,
    multiplied,
    none,
    scaled,
    store,
    store_some,
)

Place = np.uint64
W = np.uint64(WIDTH)
W2, W3, W4 = np.uint64(2 * WIDTH), np.uint64(3 * WIDTH), np.uint64(4 * WIDTH)


@machine_code
def less(z: Any, begin: int, out: Any, G: Any, Y: Any, s: int, n: int) -> None:
    """Write z - G Y to out, as ``small.subtract`` has it; rows of z count from ``begin``."""
    K, B, width = out.shape
    q, skip = np.uint64(width), np.uint64(begin * width)
    for c in range(K):
        zc, oc, gc, yc = z[c].reshape(-1)[skip:], out[c].reshape(-1), G[c], Y[c].reshape(-1)
        t = np.uint64(0)
        while t < q:  # a few columns of Y for all rows: they stay in the first cache
            for i in range(0, B, 2):
                other = min(i + 1, B - 1)
                g, h = gc[s + i], gc[s + other]
                a, b = np.uint64(i) * q + t, np.uint64(other) * q + t
                if t + W4 <= q:
                    _less_wide(zc, oc, a, b, g, h, yc, t, q, n)
                else:
                    _less_short(zc, oc, a, b, g, h, yc, t, q, n, min(q - t, W))
            t += W4 if t + W4 <= q else W


@machine_code
def _less_wide(
    z: Any, out: Any, a: Place, b: Place, g: Any, h: Any, Y: Any, t: Place, q: Place, n: int
) -> None:
    """Four registers each of the rows at ``a`` and ``b``, whose factors are ``g`` and ``h``."""
    a0, a1, a2, a3 = load(z, a), load(z, a + W), load(z, a + W2), load(z, a + W3)
    b0, b1, b2, b3 = load(z, b), load(z, b + W), load(z, b + W2), load(z, b + W3)
    for j in range(n):
        y0, y1, y2, y3 = load(Y, t), load(Y, t + W), load(Y, t + W2), load(Y, t + W3)
        u, v = -g[j], -h[j]
        a0, a1, a2, a3 = scaled(a0, u, y0), scaled(a1, u, y1), scaled(a2, u, y2), scaled(a3, u, y3)
        b0, b1, b2, b3 = scaled(b0, v, y0), scaled(b1, v, y1), scaled(b2, v, y2), scaled(b3, v, y3)
        t += q
    _store_wide(out, a, a0, a1, a2, a3)
    _store_wide(out, b, b0, b1, b2, b3)


@machine_code
def _less_short(
    z: Any,
    out: Any,
    a: Place,
    b: Place,
    g: Any,
    h: Any,
    Y: Any,
    t: Place,
    q: Place,
    n: int,
    m: Place,
) -> None:
    """One register of each, of which the first ``m`` numbers count."""
    a0, b0 = load_some(z, a, m), load_some(z, b, m)
    for j in range(n):
        y = load_some(Y, t, m)
        a0, b0 = scaled(a0, -g[j], y), scaled(b0, -h[j], y)
        t += q
    store_some(out, a, m, a0)
    store_some(out, b, m, b0)


@machine_code
def _store_wide(out: Any, at: Place, v0: Any, v1: Any, v2: Any, v3: Any) -> None:
    store(out, at, v0)
    store(out, at + W, v1)
    store(out, at + W2, v2)
    store(out, at + W3, v3)


@machine_code
def corrected(z: Any, x: Any, X: Any, G: Any, Y: Any, s: int, one: float) -> None:
    """What ``small.corrected`` does, in place."""
    products(x, X, G, s, one)
    if s:
        less(z, 0, z, G, Y, s, s)


@machine_code
def products(x: Any, X: Any, G: Any, s: int, one: float) -> None:
    """Write x to X[s:e] and x X[:e]^T + one to G[s:e, :e]."""
    K, B, width = x.shape
    e, q = s + B, np.uint64(width)
    extra = x.dtype.type(one)
    for c in range(K):
        xc, Xc, gc = x[c].reshape(-1), X[c].reshape(-1), G[c]
        for k in range(B * width):
            Xc[s * width + k] = xc[k]
        for j in range(0, e, 4):
            r0, r1 = np.uint64(j) * q, np.uint64(min(j + 1, e - 1)) * q
            r2, r3 = np.uint64(min(j + 2, e - 1)) * q, np.uint64(min(j + 3, e - 1)) * q
            for i in range(0, B, 2):
                other = min(i + 1, B - 1)
                a, b = np.uint64(i) * q, np.uint64(other) * q
                found = _dots(xc, a, b, Xc, r0, r1, r2, r3, q)
                for k in range(min(4, e - j)):
                    gc[s + i, j + k] = found[k] + extra
                    gc[s + other, j + k] = found[4 + k] + extra


@machine_code
def pairs(D: Any, P: Any) -> None:
    """Write products of rows i and j <= i of D [K, n, q] to P [K, n, n], as ``small.pairs`` has it."""
    K, n, width = D.shape
    q = np.uint64(width)
    for c in range(K):
        Dc, pc = D[c].reshape(-1), P[c]
        for j in range(0, n, 4):
            r0, r1 = np.uint64(j) * q, np.uint64(min(j + 1, n - 1)) * q
            r2, r3 = np.uint64(min(j + 2, n - 1)) * q, np.uint64(min(j + 3, n - 1)) * q
            for i in range(j, n, 2):
                other = min(i + 1, n - 1)
                a, b = np.uint64(i) * q, np.uint64(other) * q
                found = _dots(Dc, a, b, Dc, r0, r1, r2, r3, q)
                for k in range(min(4, n - j)):
                    if j + k <= i:
                        pc[i, j + k] = found[k]
                    if j + k <= other:
                        pc[other, j + k] = found[4 + k]


@machine_code
def _dots(
    x: Any, a: Place, b: Place, X: Any, r0: Place, r1: Place, r2: Place, r3: Place, q: Place
) -> Any:
    """Products of two rows of x with four of X, eight numbers."""
    zero = none(x)
    a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    t = np.uint64(0)
    while t < q:
        m = min(q - t, W)
        if m == W:
            u, v, y0, y1 = load(x, a + t), load(x, b + t), load(X, r0 + t), load(X, r1 + t)
            y2, y3 = load(X, r2 + t), load(X, r3 + t)
        else:
            u, v = load_some(x, a + t, m), load_some(x, b + t, m)
            y0, y1 = load_some(X, r0 + t, m), load_some(X, r1 + t, m)
            y2, y3 = load_some(X, r2 + t, m), load_some(X, r3 + t, m)
        a0, a1 = multiplied(a0, u, y0), multiplied(a1, u, y1)
        a2, a3 = multiplied(a2, u, y2), multiplied(a3, u, y3)
        b0, b1 = multiplied(b0, v, y0), multiplied(b1, v, y1)
        b2, b3 = multiplied(b2, v, y2), multiplied(b3, v, y3)
        t += W
    return (
        added(a0), added(a1), added(a2), added(a3), added(b0), added(b1), added(b2), added(b3),
    )  # fmt: skip


@machine_code
def compress(
    x: Any, width: int, blocks: Any, rows: Any, starts: Any, columns: Any, values: Any
) -> int:
    """Write what is not 0 in x [N, n] as ``sparse.Sparse`` has it, in blocks so wide; returns the runs."""
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
    """Add to out [N, q] the matrix of ``sparse.Sparse`` times dense [n, q]."""
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
                    _store_wide(of, at, a, b, c, d)
                else:
                    a = load_some(of, at, m)
                    for j in range(first, last):
                        r = np.uint64(columns[j]) * q + t
                        a = scaled(a, values[j], load_some(df, r, m))
                    store_some(of, at, m, a)
            t += (W4 + m if more else W4) if wide else W


@machine_code
def add_rows(D: Any, place: Any, s: int, d: Any) -> None:
    """Add d[c, i] to D[place[c, s + i]], for rows of D [K n, q] and of d [K, B, q]."""
    for c in range(len(d)):
        for i in range(d.shape[1]):
            to, row = D[place[c, s + i]], d[c, i]
            for k in range(len(row)):
                to[k] += row[k]


@machine_code
def cross_entropy(z: Any, y: Any, s: int, d: Any, losses: Any) -> None:
    """Write softmax minus one-hot of z [k, B, C] to d, and losses [K, T] from s on; labels y [K, T, 1]."""
    for c in range(z.shape[0]):
        for i in range(z.shape[1]):
            row, out, label = z[c, i], d[c, i], y[c, s + i, 0]
            top = row[0]
            for k in range(1, len(row)):
                top = max(top, row[k])
            total = z.dtype.type(0)
            for k in range(len(row)):
                out[k] = math.exp(row[k] - top)
                total += out[k]
            for k in range(len(row)):
                out[k] /= total
            out[label] -= z.dtype.type(1)
            losses[c, s + i] = math.log(total) - (row[label] - top)
