"""Compiled products of a few rows with each client's own weights; only to be imported where numba is.

A client's batch is a few rows, and the matrix they meet is its alone: a library spends its time on laying
out what it reads once. Here sixteen sums stay in registers, and numbers are read where they lie. Rows that
only fill up a batch are left out, and so are sixteen zeros in a row, two fifths of an MNIST image. Places
are counted in numbers.
"""

from typing import Any

import numpy as np

from fedtorch.kernels.compile import machine_code
from fedtorch.kernels.registers import (
    FITS,
    TEN,
    crossed,
    crossed_some,
    every,
    grown,
    spread,
    square,
    store_rows,
    store_some_rows,
    store_ten,
    sums,
    tile,
    turned,
)
from fedtorch.kernels.vector import (
    WIDTH,
    load,
    load_some,
    none,
    nonzero,
    plus,
    scaled,
    store,
    store_some,
    upper,
)

__all__ = [
    "FITS", "gradient", "inputs", "narrow_step", "outputs", "panels", "shared", "sq_norms", "turn",
]  # fmt: skip

Place = np.uint64
W = np.uint64(WIDTH)
W2, W3, W4 = np.uint64(2 * WIDTH), np.uint64(3 * WIDTH), np.uint64(4 * WIDTH)
ZERO, EIGHT, ROWS = np.uint64(0), np.uint64(8), np.uint64(TEN)


@machine_code
def outputs(a: Any, counts: Any, weight: Any, bias: Any, out: Any) -> None:
    """Write a W^T + b to out, as ``copies.outputs`` has it, and zeros where there is no example."""
    K, B, width = a.shape
    p, q = np.uint64(width), np.uint64(out.shape[2])
    places = np.empty((B // 2 + 1, width // WIDTH + 1), np.uint32)
    lengths = np.empty(B // 2 + 1, np.int64)
    for c in range(K):
        n = counts[c]
        x, w, b, z = a[c].reshape(-1), weight[c], bias[c, 0], out[c].reshape(-1)
        for i in range(0, n, 2):  # where not both rows have sixteen zeros
            u, v = np.uint64(i) * p, np.uint64(min(i + 1, n - 1)) * p
            m, t = 0, ZERO
            while t + W <= p:
                places[i // 2, m] = t
                m += nonzero(load(x, u + t)) | nonzero(load(x, v + t))
                t += W
            lengths[i // 2] = m
        o = ZERO
        while o < q:
            o = min(o, q - EIGHT)
            start = load_some(b, o, EIGHT if len(b) else ZERO)
            for i in range(0, n, 2):
                u, v = np.uint64(i), np.uint64(min(i + 1, n - 1))
                found = _dots(x, u * p, v * p, w, (o, p), places[i // 2, : lengths[i // 2]])
                store_some(z, u * q + o, EIGHT, plus(start, found))
                store_some(z, v * q + o, EIGHT, plus(start, upper(found)))
            o += EIGHT
        z[n * out.shape[2] :] = 0


@machine_code
def _dots(x: Any, u: Place, v: Place, w: Any, rows: Any, places: Any) -> Any:
    """Products of the rows of x at u and at v with eight of w, sixteen numbers."""
    total, p = tile(x), rows[1]
    for place in places:
        t = np.uint64(place)
        total = crossed(total, load(x, u + t), load(x, v + t), w, rows, t)
    t = p // W * W
    if t < p:
        m = p - t
        s, r = load_some(x, u + t, m), load_some(x, v + t, m)
        total = crossed_some(total, s, r, w, rows, t, m)
    return sums(total)


@machine_code
def inputs(d: Any, counts: Any, weight: Any, by: Any, out: Any) -> None:
    """Write d W to out, as ``copies.inputs`` has it, and zeros where there is no example.

    Also where ``by`` is not positive, if it has rows at all.
    """
    p, q = np.uint64(out.shape[2]), np.uint64(d.shape[2])
    for c in range(len(out)):
        n = counts[c]
        f, w, o = d[c].reshape(-1), weight[c], out[c].reshape(-1)
        t = ZERO
        while t < p:
            wide = t + W4 <= p
            for i in range(0, n, 2):
                u, v = np.uint64(i), np.uint64(min(i + 1, n - 1))
                if wide:
                    _summed_wide(f, u * q, v * q, q, w, t, p, o, u * p + t, v * p + t)
                else:
                    m = min(p - t, W)
                    _summed_short(f, u * q, v * q, q, w, t, p, o, u * p + t, v * p + t, m)
            t += W4 if wide else W
        o[n * out.shape[2] :] = 0
        zero = out.dtype.type(0)
        for i in range(n if by.shape[1] else 0):
            row, a = out[c, i], by[c, i]
            for k in range(len(row)):
                row[k] = zero if a[k] <= zero else row[k]


@machine_code
def _summed_wide(
    f: Any, u: Place, v: Place, n: Place, Y: Any, t: Place, p: Place, out: Any, a: Place, b: Place
) -> None:
    """Write the sums of n rows of Y, times the numbers of f at u and at v, from t on to out at a and b."""
    zero = none(out)
    a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    for j in range(n):
        y0, y1, y2, y3 = load(Y, t), load(Y, t + W), load(Y, t + W2), load(Y, t + W3)
        r, s = f[u + j], f[v + j]
        a0, a1, a2, a3 = scaled(a0, r, y0), scaled(a1, r, y1), scaled(a2, r, y2), scaled(a3, r, y3)
        b0, b1, b2, b3 = scaled(b0, s, y0), scaled(b1, s, y1), scaled(b2, s, y2), scaled(b3, s, y3)
        t += p
    store(out, a, a0)
    store(out, a + W, a1)
    store(out, a + W2, a2)
    store(out, a + W3, a3)
    store(out, b, b0)
    store(out, b + W, b1)
    store(out, b + W2, b2)
    store(out, b + W3, b3)


@machine_code
def _summed_short(
    f: Any,
    u: Place,
    v: Place,
    n: Place,
    Y: Any,
    t: Place,
    p: Place,
    out: Any,
    a: Place,
    b: Place,
    m: Place,
) -> None:
    """The same for the first m numbers of one register."""
    a0, b0 = none(out), none(out)
    for j in range(n):
        y = load_some(Y, t, m)
        a0, b0 = scaled(a0, f[u + j], y), scaled(b0, f[v + j], y)
        t += p
    store_some(out, a, m, a0)
    store_some(out, b, m, b0)


@machine_code
def gradient(d: Any, a: Any, counts: Any, k: int, out: Any, bias: Any) -> None:
    """Write d^T a of client k to out, and the sum of d to bias, as ``copies.sums`` has it."""
    n = counts[k]
    _added(d[k], n, bias)
    if len(out) < WIDTH:
        _narrow(d[k], a[k], n, out)
        return
    p, q = np.uint64(a.shape[2]), np.uint64(len(out))
    f, x, to = d[k].reshape(-1), a[k].reshape(-1), out.reshape(-1)
    ds, xs = np.empty(n, np.uint64), np.empty(n, np.uint64)
    t = ZERO
    while t < p:
        m, some = min(p - t, W), 0
        for i in range(n):  # whose next sixteen numbers are not all 0
            ds[some], xs[some] = np.uint64(i) * q, np.uint64(i) * p + t
            some += nonzero(load_some(x, xs[some], m))
        o = ZERO
        while o < q:
            o = min(o, q - W)
            if m == W:
                _whole(f, ds[:some], x, xs, to, (o, p), t)
            else:
                _part(f, ds[:some], x, xs, to, (o, p), t, m)
            o += W
        t += W


@machine_code
def narrow_step(d: Any, a: Any, counts: Any, keep: float, weight: Any, bias: Any) -> None:
    """Take d^T a and the sum of d off what is to be kept of each client's weight and bias [K, 1, out]."""
    left = weight.dtype.type(keep)
    for c in range(len(d)):
        for o in range(weight.shape[1]):
            row = weight[c, o]
            if left != 1:
                for t in range(len(row)):
                    row[t] *= left
            for i in range(counts[c]):
                f, x = d[c, i, o], a[c, i]
                for t in range(len(row)):
                    row[t] -= f * x[t]
        b = bias[c, 0]
        for o in range(len(b)):
            b[o] *= left
            for i in range(counts[c]):
                b[o] -= d[c, i, o]


@machine_code
def panels(w: Any, out: Any) -> None:
    """Write w [p, q] to out [q / 16, p, 16], the last columns filled up with zeros."""
    p, q = w.shape
    for n in range(len(out)):
        for t in range(p):
            row, to = w[t], out[n, t]
            for k in range(WIDTH):
                to[k] = row[n * WIDTH + k] if n * WIDTH + k < q else 0


@machine_code
def shared(a: Any, w: Any, bias: Any, out: Any) -> None:
    """Write a times the matrix in these panels, plus the bias if there is one, to out; ten rows or more."""
    R, q, p = np.uint64(a.shape[0]), np.uint64(out.shape[1]), np.uint64(a.shape[1])
    x, f, to = a.reshape(-1), w.reshape(-1), out.reshape(-1)
    o = at = ZERO
    while o < q:
        n = min(q - o, W)
        start = every(load_some(bias, o, n if len(bias) else ZERO))
        r = ZERO
        while r < R:
            r = min(r, R - ROWS)
            total, place = start, at
            for t in range(p):
                total = grown(total, x, (r, p), np.uint64(t), load(f, place))
                place += W
            store_ten(to, (r, q), o, total, n)
            r += ROWS
        o += W
        at += p * W


@machine_code
def turn(x: Any, out: Any) -> None:
    """Write x [p, q] to out [q, p], for at least sixteen of each."""
    p, q = np.uint64(x.shape[0]), np.uint64(x.shape[1])
    f, to = x.reshape(-1), out.reshape(-1)
    i = ZERO
    while i < p:
        i = min(i, p - W)
        t = ZERO
        while t < q:
            t = min(t, q - W)
            store_rows(to, (t, p), i, turned(square(f, (i, q), t)))
            t += W
        i += W


@machine_code
def sq_norms(d: Any, a: Any, counts: Any, extra: float, out: Any) -> None:
    """Write |d|^2 (|a|^2 + extra) of each example to out [K, B], 0 where there is none."""
    out[:] = 0.0
    for c in range(len(out)):
        for i in range(counts[c]):
            x, g = a[c, i], d[c, i]
            lengths, squares = np.float64(extra), 0.0
            for t in range(len(x)):
                lengths += np.float64(x[t]) * np.float64(x[t])
            for t in range(len(g)):
                squares += np.float64(g[t]) * np.float64(g[t])
            out[c, i] = squares * lengths


@machine_code
def _added(d: Any, n: int, out: Any) -> None:
    """Write the sum of the first n rows to out, if there is any."""
    out[:] = 0
    for i in range(n if len(out) else 0):
        for o in range(len(out)):
            out[o] += d[i, o]


@machine_code
def _narrow(d: Any, a: Any, n: int, out: Any) -> None:
    """The gradient where it has fewer rows than a tile."""
    out[:] = 0
    for o in range(len(out)):
        for i in range(n):
            for t in range(out.shape[1]):
                out[o, t] += d[i, o] * a[i, t]


@machine_code
def _whole(f: Any, ds: Any, x: Any, xs: Any, out: Any, rows: Any, t: Place) -> None:
    """Sixteen rows of the sum over examples, whose numbers are at ds and xs, from t on."""
    total = tile(x)
    for i in range(len(ds)):
        total = spread(total, f, ds[i] + rows[0], load(x, xs[i]))
    store_rows(out, rows, t, total)


@machine_code
def _part(f: Any, ds: Any, x: Any, xs: Any, out: Any, rows: Any, t: Place, m: Place) -> None:
    """The same where a row has no more than m numbers left."""
    total = tile(x)
    for i in range(len(ds)):
        total = spread(total, f, ds[i] + rows[0], load_some(x, xs[i], m))
    store_some_rows(out, rows, t, total, m)
