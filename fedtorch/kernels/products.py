"""Loops of the fast path that are compiled; only to be imported where numba is installed.

Sums stay in registers: two rows at a time against four registers, or four rows, of the other matrix, which
is as much as an AVX-512 processor can keep busy with; where registers are shorter it is done in two halves,
which changes no bit. Matrices are flat, with places counted in numbers.
"""

from typing import Any

import numpy as np

from fedtorch.kernels.compile import machine_code
from fedtorch.kernels.vector import (
    HALVES,
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
RELU, MASK = 1, 2
ENDS = {"": 0, "relu": RELU, "mask": MASK}


@machine_code
def less(
    z: Any, index: Any, G: Any, local: Any, Y: Any, seen: Any, many: Any, s: int, by: Any, out: Any
) -> None:
    """Write keep z - rate G Y to out, as ``ops.Coefficients`` has it; ``by``: keep, rate, relu."""
    K, B, width = out.shape
    q, zf, factors = np.uint64(width), z.reshape(-1), (z.dtype.type(by[0]), z.dtype.type(-by[1]))
    for c in range(K):
        gc, yc, oc = G[c], Y[c].reshape(-1), out[c].reshape(-1)
        some = seen[c, : many[c]]
        t = np.uint64(0)
        while t < q:  # a few columns of Y for all rows: they stay in the first cache
            for i in range(0, B, 2):
                k, m = s + i, s + min(i + 1, B - 1)
                given = np.uint64(index[c, k]) * q + t, np.uint64(index[c, m]) * q + t
                to = np.uint64(k - s) * q + t, np.uint64(m - s) * q + t
                g, h = gc[local[c, k]], gc[local[c, m]]
                if t + W4 <= q:
                    less_wide(zf, given, oc, to, g, h, yc, t, q, some, factors)
                else:
                    less_short(zf, given, oc, to, g, h, yc, t, q, some, factors, min(q - t, W))
            t += W4 if t + W4 <= q else W
        if by[2] == RELU:
            relu(oc)


@machine_code
def relu(a: Any) -> None:
    """Write 0 where a is less, which what is not a number is not."""
    zero = a.dtype.type(0)
    for k in range(len(a)):
        a[k] = zero if a[k] <= zero else a[k]


@machine_code
def masked(d: Any, a: Any) -> None:
    """ReLU backward in place: d is 0 where a <= 0, and stays where a is NaN. They must not share memory."""
    zero = d.dtype.type(0)
    for k in range(len(a)):
        d[k] = zero if a[k] <= zero else d[k]


@machine_code
def less_wide(
    z: Any,
    given: Any,
    out: Any,
    to: Any,
    g: Any,
    h: Any,
    Y: Any,
    t: Place,
    q: Place,
    some: Any,
    by: Any,
) -> None:
    """Four registers each of two rows, ``given`` in z and written ``to`` out, whose factors are g and h."""
    (c, d), (keep, rate) = given, by
    if HALVES:
        _less_two(z, (c, d), out, to, g, h, Y, t, q, some, by)
        given, to = (c + W2, d + W2), (to[0] + W2, to[1] + W2)
        _less_two(z, given, out, to, g, h, Y, t + W2, q, some, by)
        return
    zero = none(z)
    a0, a1 = scaled(zero, keep, load(z, c)), scaled(zero, keep, load(z, c + W))
    a2, a3 = scaled(zero, keep, load(z, c + W2)), scaled(zero, keep, load(z, c + W3))
    b0, b1 = scaled(zero, keep, load(z, d)), scaled(zero, keep, load(z, d + W))
    b2, b3 = scaled(zero, keep, load(z, d + W2)), scaled(zero, keep, load(z, d + W3))
    for j in some:
        r = np.uint64(j) * q + t
        y0, y1, y2, y3 = load(Y, r), load(Y, r + W), load(Y, r + W2), load(Y, r + W3)
        u, v = rate * g[j], rate * h[j]
        a0, a1, a2, a3 = scaled(a0, u, y0), scaled(a1, u, y1), scaled(a2, u, y2), scaled(a3, u, y3)
        b0, b1, b2, b3 = scaled(b0, v, y0), scaled(b1, v, y1), scaled(b2, v, y2), scaled(b3, v, y3)
    _store_wide(out, to[0], a0, a1, a2, a3)
    _store_wide(out, to[1], b0, b1, b2, b3)


@machine_code
def _less_two(
    z: Any,
    given: Any,
    out: Any,
    to: Any,
    g: Any,
    h: Any,
    Y: Any,
    t: Place,
    q: Place,
    some: Any,
    by: Any,
) -> None:
    """Half as many."""
    (c, d), (keep, rate) = given, by
    zero = none(z)
    a0, a1 = scaled(zero, keep, load(z, c)), scaled(zero, keep, load(z, c + W))
    b0, b1 = scaled(zero, keep, load(z, d)), scaled(zero, keep, load(z, d + W))
    for j in some:
        r = np.uint64(j) * q + t
        y0, y1 = load(Y, r), load(Y, r + W)
        u, v = rate * g[j], rate * h[j]
        a0, a1, b0, b1 = scaled(a0, u, y0), scaled(a1, u, y1), scaled(b0, v, y0), scaled(b1, v, y1)
    store(out, to[0], a0)
    store(out, to[0] + W, a1)
    store(out, to[1], b0)
    store(out, to[1] + W, b1)


@machine_code
def less_short(
    z: Any,
    given: Any,
    out: Any,
    to: Any,
    g: Any,
    h: Any,
    Y: Any,
    t: Place,
    q: Place,
    some: Any,
    by: Any,
    m: Place,
) -> None:
    """One register of each, of which the first ``m`` numbers count."""
    keep, rate = by
    a0 = scaled(none(z), keep, load_some(z, given[0], m))
    b0 = scaled(none(z), keep, load_some(z, given[1], m))
    for j in some:
        y = load_some(Y, np.uint64(j) * q + t, m)
        a0, b0 = scaled(a0, rate * g[j], y), scaled(b0, rate * h[j], y)
    store_some(out, to[0], m, a0)
    store_some(out, to[1], m, b0)


@machine_code
def _store_wide(out: Any, at: Place, v0: Any, v1: Any, v2: Any, v3: Any) -> None:
    store(out, at, v0)
    store(out, at + W, v1)
    store(out, at + W2, v2)
    store(out, at + W3, v3)


@machine_code
def corrected(
    z: Any, x: Any, X: Any, G: Any, Y: Any, s: int, one: float, keep: float, end: int
) -> None:
    """What ``ops.append`` does, in place."""
    products(x, X, G, s, one)
    K, B, width = z.shape
    if s:
        rows, before = np.arange(K * B).reshape(K, B), np.empty((K, s), np.int64)
        before[:] = np.arange(s)
        less(z, rows, G, rows % B + s, Y, before, np.full(K, s), 0, (keep, 1.0, 0), z)
    if end:
        for c in range(K):
            if end == RELU:
                relu(z[c].reshape(-1))
            else:
                masked(z[c].reshape(-1), Y[c].reshape(-1)[s * width : (s + B) * width])


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
        row_products(xc, Xc, q, e, gc[s:e], extra)


@machine_code
def row_products(x: Any, X: Any, q: Place, e: int, out: Any, extra: Any) -> None:
    """Write the products of rows [B, q] of x with the first e rows of X, plus ``extra``, to out [B, e]."""
    B = len(out)
    for j in range(0, e, 4):
        r0, r1 = np.uint64(j) * q, np.uint64(min(j + 1, e - 1)) * q
        r2, r3 = np.uint64(min(j + 2, e - 1)) * q, np.uint64(min(j + 3, e - 1)) * q
        for i in range(0, B, 2):
            other = min(i + 1, B - 1)
            found = dots(x, np.uint64(i) * q, np.uint64(other) * q, X, r0, r1, r2, r3, q)
            for k in range(min(4, e - j)):
                out[i, j + k] = found[k] + extra
                out[other, j + k] = found[4 + k] + extra


@machine_code
def dots(
    x: Any, a: Place, b: Place, X: Any, r0: Place, r1: Place, r2: Place, r3: Place, q: Place
) -> Any:
    """Products of two rows of x with four of X, eight numbers."""
    if HALVES:
        a0, a1, b0, b1 = _dots_two(x, a, b, X, r0, r1, q)
        a2, a3, b2, b3 = _dots_two(x, a, b, X, r2, r3, q)
        return a0, a1, a2, a3, b0, b1, b2, b3
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
def _dots_two(x: Any, a: Place, b: Place, X: Any, r0: Place, r1: Place, q: Place) -> Any:
    """With two of them."""
    zero = none(x)
    a0, a1, b0, b1 = zero, zero, zero, zero
    t = np.uint64(0)
    while t < q:
        m = min(q - t, W)
        if m == W:
            u, v, y0, y1 = load(x, a + t), load(x, b + t), load(X, r0 + t), load(X, r1 + t)
        else:
            u, v = load_some(x, a + t, m), load_some(x, b + t, m)
            y0, y1 = load_some(X, r0 + t, m), load_some(X, r1 + t, m)
        a0, a1 = multiplied(a0, u, y0), multiplied(a1, u, y1)
        b0, b1 = multiplied(b0, v, y0), multiplied(b1, v, y1)
        t += W
    return added(a0), added(a1), added(b0), added(b1)


@machine_code
def add_rows(Y: Any, local: Any, s: int, d: Any, seen: Any, many: Any, marks: Any) -> None:
    """Add d[c, i] to Y[c, local[c, s + i]], and write down which rows are not all 0 any more."""
    for c in range(len(d)):
        for i in range(d.shape[1]):
            j = local[c, s + i]
            to, row = Y[c, j], d[c, i]
            for k in range(len(row)):
                to[k] += row[k]
            if not marks[c, j]:
                marks[c, j], seen[c, many[c]] = True, j
                many[c] += 1
