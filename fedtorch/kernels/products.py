"""Loops of the fast path that are compiled; only to be imported where numba is installed.

Sums stay in registers: two rows at a time against four registers, or four rows, of the other matrix, which
is as much as an AVX-512 processor can keep busy with; where registers are shorter it is done in two halves,
which changes no bit. Matrices are flat, with places counted in numbers.
"""

from typing import Any

import numpy as np

from fedtorch.kernels.compile import machine_code
from fedtorch.kernels.tiles import ROWS, SIDE, dots
from fedtorch.kernels.vector import (
    HALVES,
    WIDTH,
    load,
    load_some,
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
DOTS = 1 if HALVES else ROWS
HIGH, FOUR, some_dots, row_dots = np.uint64(DOTS), np.uint64(SIDE), dots(DOTS), dots(1)


@machine_code
def less(
    z: Any, index: Any, G: Any, local: Any, Y: Any, seen: Any, many: Any, s: int, by: Any, out: Any
) -> None:
    """Write keep z - rate G Y to out, as ``ops.Coefficients`` has it; ``by``: keep, rate, relu."""
    K, B, width = out.shape
    factors = z.dtype.type(by[0]), z.dtype.type(-by[1])
    for c in range(K):
        places, oc = (index[c, s : s + B], local[c, s : s + B]), out[c].reshape(-1)
        some, q = seen[c, : many[c]], np.uint64(width)
        less_rows(z.reshape(-1), G[c], Y[c].reshape(-1), places, some, factors, q, oc)
        if by[2] == RELU:
            relu(oc)


@machine_code
def less_rows(
    z: Any, G: Any, Y: Any, places: Any, some: Any, factors: Any, q: Place, out: Any
) -> None:
    """The same of one client's rows of q numbers, z, Y and ``out`` being flat; ``factors``: keep, -rate.

    ``places``: the examples as rows of z and of G; ``some``: the rows of Y that are not all 0.
    """
    index, local = places
    B, t = len(index), np.uint64(0)
    while t < q:  # a few columns of Y for all rows: they stay in the first cache
        for i in range(0, B, 2):
            k = min(i + 1, B - 1)
            given = np.uint64(index[i]) * q + t, np.uint64(index[k]) * q + t
            to = np.uint64(i) * q + t, np.uint64(k) * q + t
            g, h = G[local[i]], G[local[k]]
            if t + W4 <= q:
                less_four(z, given, out, to, g, h, Y, t, q, some, factors)
            else:
                less_one(z, given, out, to, g, h, Y, t, q, some, factors, min(q - t, W))
        t += W4 if t + W4 <= q else W


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
def less_four(
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
        less_two(z, (c, d), out, to, g, h, Y, t, q, some, by)
        given, to = (c + W2, d + W2), (to[0] + W2, to[1] + W2)
        less_two(z, given, out, to, g, h, Y, t + W2, q, some, by)
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
    _store_four(out, to[0], a0, a1, a2, a3)
    _store_four(out, to[1], b0, b1, b2, b3)


@machine_code
def less_two(
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
    """Two registers each of the same rows."""
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
def less_one(
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
def _store_four(out: Any, at: Place, v0: Any, v1: Any, v2: Any, v3: Any) -> None:
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
        # number by number: arrays as wholes would take seconds to compile
        rows, local = counted(K * B).reshape(K, B), np.empty((K, B), np.int64)
        before, many = np.empty((K, s), np.int64), np.empty(K, np.int64)
        for c in range(K):
            many[c] = s
            for j in range(s):
                before[c, j] = j
            for i in range(B):
                local[c, i] = s + i
        less(z, rows, G, local, Y, before, many, 0, (keep, 1.0, 0), z)
    if end:
        for c in range(K):
            if end == RELU:
                relu(z[c].reshape(-1))
            else:
                masked(z[c].reshape(-1), Y[c].reshape(-1)[s * width : (s + B) * width])


@machine_code
def counted(n: int) -> Any:
    """The numbers from 0 on."""
    found = np.empty(n, np.int64)
    for k in range(n):
        found[k] = k
    return found


@machine_code
def products(x: Any, X: Any, G: Any, s: int, one: float) -> None:
    """Write x to X[s:e] and x X[:e]^T + one to G[s:e, :e]."""
    K, B, width = x.shape
    e, q, extra = s + B, np.uint64(width), x.dtype.type(one)
    for c in range(K):
        xc, Xc, gc = x[c].reshape(-1), X[c].reshape(-1), G[c].reshape(-1)
        for k in range(B * width):
            Xc[s * width + k] = xc[k]
        row_products(xc, Xc, q, (B, e), gc, (s * G.shape[2], G.shape[2]), extra)


@machine_code
def row_products(x: Any, X: Any, q: Place, size: Any, out: Any, at: Any, extra: Any) -> None:
    """Write the products of the first B rows [B, q] of x with e of X, plus ``extra``, to out, all flat.

    ``size``: B and e; ``at``: where the first row of results is in ``out``, and how far the next from it.
    """
    B, e, begin, apart = np.uint64(size[0]), np.uint64(size[1]), np.uint64(at[0]), np.uint64(at[1])
    zero, one, j = np.uint64(0), np.uint64(1), np.uint64(0)
    while j < e:
        i, m = zero, min(e - j, FOUR)
        while i + HIGH <= B:
            some_dots(x, X, out, begin, apart, q, i, j, e, m, extra)
            i += HIGH
        while i < B:
            row_dots(x, X, out, begin, apart, q, i, j, e, m, extra)
            i += one
        j += FOUR


@machine_code
def add_rows(Y: Any, local: Any, s: int, d: Any, seen: Any, many: Any, marks: Any) -> None:
    """Add d[c, i] to Y[c, local[c, s + i]], and write down which rows are not all 0 any more."""
    B = d.shape[1]
    for c in range(len(d)):
        at = local[c, s : s + B]
        many[c] = add_to(Y[c], at, d[c].reshape(-1), seen[c], many[c], marks[c])


@machine_code
def add_to(Y: Any, local: Any, d: Any, seen: Any, many: int, marks: Any) -> int:
    """The same of one client's rows, d being flat; returns how many are not all 0 any more."""
    q = Y.shape[1]
    for i in range(len(local)):
        j = local[i]
        to, row = Y[j], d[i * q : (i + 1) * q]
        for k in range(q):
            to[k] += row[k]
        if not marks[j]:
            marks[j], seen[many] = True, j
            many += 1
    return many
