"""Whole visits of clients whose layers are small enough to stay in a core's cache, one after another.

Only to be imported where numba is installed.
"""

from typing import Any

import numpy as np

from fedtorch.kernels.closing import gradient
from fedtorch.kernels.compile import machine_code
from fedtorch.kernels.products import add_to, less_rows, masked, relu, row_products
from fedtorch.kernels.tiles import ACROSS, HALF, ROWS, backward
from fedtorch.kernels.vector import WIDTH

W, WIDE, HIGH = np.uint64(WIDTH), np.uint64(ACROSS * WIDTH), np.uint64(ROWS)
wider, H = backward(ROWS, ACROSS, True), np.uint64(HALF)
block, column = backward(ROWS, ACROSS), backward(ROWS, 1)
row, rest = backward(1, ACROSS), backward(1, 1)


@machine_code
def visits(
    own: Any, layers: Any, inputs: Any, given: Any, steps: Any, by: Any, room: Any, sums: Any
) -> None:
    """What ``ops.visits`` does; ``by``: examples in a step, what one keeps of the weights, the start.

    ``room``: for a client's parameters, for what all layers take, for the gradient of what one puts out,
    for the next one's, and for places of outputs. The changes' squared norms and the mean losses are
    written to ``sums``.
    """
    (x, index), (B, keep, start), (w, a, d, _, _) = inputs, by, room
    for c in range(len(own)):
        total, before = 0.0, start
        for t in range(steps[c]):
            forward(before, layers, x, index[c, t * B : (t + 1) * B], a, d)
            total = lost(total, layers[len(layers) - 1, 0], given, index[c], (c, t * B, B), d)
            back(before, layers, room, B, x.dtype.type(keep), (t == 0, False))
            before = w
        sums[0][c], sums[1][c] = moved(before, start, own[c]), total / steps[c]


@machine_code
def behind(
    own: Any, layers: Any, first: Any, given: Any, steps: Any, by: Any, room: Any, sums: Any
) -> None:
    """What ``ops.behind`` does; ``first``: what ``loops.Coefficients`` knows, in this order."""
    (z, index, G, local, rows, seen, many, marks), (B, start), (w, a, d, _, _) = first, by, room
    into, one = layers[0, 1], z.dtype.type(1)
    for c in range(len(own)):
        total, before, met, D, n = 0.0, start, a[: B * into], rows[c].reshape(-1), many[c]
        for t in range(steps[c]):
            s = t * B
            places = index[c, s : s + B], local[c, s : s + B]
            less_rows(
                z.reshape(-1), G[c], D, places, seen[c, :n], (one, -one), np.uint64(into), met
            )
            relu(met)
            through(before, layers, a, B, d)
            total = lost(total, layers[len(layers) - 1, 0], given, index[c], (c, s, B), d)
            g = back(before, layers, room, B, one, (t == 0, True))
            n = add_to(rows[c], places[1], g, seen[c], n, marks[c])
            before = w
        many[c] = n
        sums[0][c], sums[1][c] = moved(before, start, own[c]), total / steps[c]


@machine_code
def lost(total: float, C: int, given: Any, index: Any, at: Any, d: Any) -> float:
    """Put the gradient in the place of logits d [B, C], and take the losses' shares from ``total``.

    ``given``: as ``ops.visits`` has it; ``index``: the client's examples; ``at``: client, row and rows.
    """
    (y, scale, factor), (c, s, B) = given, at
    for i in range(B):
        z, share = d[i * C : (i + 1) * C], scale[c, s + i, 0]
        if share > 0:
            loss = gradient(z, y[index[s + i]], factor[c, s + i, 0])
            total -= float(loss) * float(share)
        else:  # whatever is there
            z[:] = 0
    return total


@machine_code
def forward(w: Any, layers: Any, x: Any, index: Any, a: Any, out: Any) -> None:
    """Write what each layer takes to ``a``, one behind the other, and what the last puts out to ``out``."""
    B = len(index)
    for i in range(B):
        given, to = x[index[i]], a[i * x.shape[1] :]
        for k in range(x.shape[1]):
            to[k] = given[k]
    through(w, layers, a, B, out)


@machine_code
def through(w: Any, layers: Any, a: Any, B: int, out: Any) -> None:
    """The same where ``a`` begins with what the first layer takes."""
    last, at = len(layers) - 1, 0
    for n in range(last + 1):
        size, into, weight, bias = layers[n]
        taken = a[at : at + B * into]
        z = out[: B * size] if n == last else a[at + B * into : at + B * (into + size)]
        row_products(taken, w[weight:], np.uint64(into), (B, size), z, (0, size), w.dtype.type(0))
        if bias >= 0:
            for i in range(B):
                to, more = z[i * size : (i + 1) * size], w[bias : bias + size]
                for k in range(size):
                    to[k] += more[k]
        if n < last:
            relu(z)
        at += B * into


@machine_code
def back(v: Any, layers: Any, room: Any, B: int, keep: Any, ways: Any) -> Any:
    """Pass the gradient of what the last layer puts out down through all of them, and step from v.

    ``ways``: whether these are the parameters of a client that has none of its own yet, and whether the
    gradient is passed out of the first layer too, which takes what a ReLU has put out. Returned is what was
    passed down last.
    """
    (w, a, d, down, of), (begins, passes), at = room, ways, len(room[1])
    for n in range(len(layers) - 1, -1, -1):
        size, into, weight, bias = layers[n]
        at -= B * into
        taken = a[at : at + B * into]
        on = passes or n > 0
        some = listed(d, (B, size), down, of)
        down[: B * into] = 0
        if begins or keep != 1:
            for k in range(some, size):
                i = weight + np.int64(of[k]) * into
                to, left = w[i : i + into], v[i : i + into]
                for j in range(into):
                    to[j] = left[j] * keep
        layer(w[weight:], v[weight:], d, taken, down, (B, size, into), keep, on, of[:some])
        if bias >= 0:
            b, old = w[bias : bias + size], v[bias : bias + size]
            for k in range(size):
                b[k] = old[k] * keep
            for i in range(B):
                one = d[i * size : (i + 1) * size]
                for k in range(size):
                    b[k] -= one[k]
        if on:
            masked(down[: B * into], taken)
            d, down = down, d
    return d


@machine_code
def layer(
    w: Any, v: Any, d: Any, a: Any, down: Any, shape: Any, keep: Any, passes: bool, of: Any
) -> None:
    """Rows ``of`` one layer with weights [size, in], block after block: what ``tiles.backward`` does."""
    B, n, q = np.uint64(shape[0]), np.uint64(shape[1]), np.uint64(shape[2])
    some, o = np.uint64(len(of)), np.uint64(0)
    while o < some:
        whole, t = o + HIGH <= some, np.uint64(0)
        while t < q:
            wide, left = t + WIDE <= q, q - t
            more = whole and left > WIDE and left - WIDE <= H
            m = left - WIDE if more else W if wide else min(left, W)
            if more:  # a few columns have no loop of their own, which would wait for its sums
                wider(w, v, d, a, down, of, B, n, q, o, t, m, keep, passes)
            elif wide and whole:
                block(w, v, d, a, down, of, B, n, q, o, t, m, keep, passes)
            elif wide:
                row(w, v, d, a, down, of, B, n, q, o, t, m, keep, passes)
            elif whole:
                column(w, v, d, a, down, of, B, n, q, o, t, m, keep, passes)
            else:
                rest(w, v, d, a, down, of, B, n, q, o, t, m, keep, passes)
            t += left if more else WIDE if wide else W
        o += HIGH if whole else np.uint64(1)


@machine_code
def listed(d: Any, shape: Any, room: Any, of: Any) -> int:
    """Write the columns of d [B, size] that are not all 0 to ``of``, then the others; returns how many.

    What a ReLU has shut for all examples passes nothing down and does not step. Some such are counted among
    those that do, where a block has room for more. ``room``: for a number of each.
    """
    (B, n), some, last = shape, 0, shape[1] - 1
    room[:n] = 0
    for i in range(B):
        one = d[i * n : (i + 1) * n]
        for o in range(n):
            room[o] += abs(one[o])
    for o in range(
        n
    ):  # in both places, of which one is written over: a processor cannot guess which
        of[some] = of[last] = o
        on = room[o] != 0
        some += on
        last -= not on
    return int(min(n, some + -some % ROWS))


@machine_code
def moved(w: Any, start: Any, change: Any) -> float:
    """Write what w is more than ``start`` to ``change``, and sum up its squares."""
    total = 0.0
    for k in range(len(start)):
        far = w[k] - start[k]
        change[k] = far
        total += float(far) * float(far)
    return total
