"""A client's step of DP-SGD but for the noise, its parameters in one row: linear layers, ReLU between them.

Only to be imported where numba is installed.
"""

import math
from typing import Any

import numpy as np

from fedtorch.kernels.closing import gradient as closed
from fedtorch.kernels.compile import machine_code
from fedtorch.kernels.copies import down, gradient
from fedtorch.kernels.products import add_to, less_rows, masked, relu
from fedtorch.kernels.visits import forward, through


@machine_code
def clipped(
    w: Any,
    layers: Any,
    inputs: Any,
    y: Any,
    losses: Any,
    at: Any,
    room: Any,
    clip: float,
    into: Any,
) -> None:
    """What ``ops.Clips.sums`` does; ``room``: as below, and for squared norms and factors."""
    (x, index, lengths), (c, s, n), (a, d, squares, factors) = inputs, at, room
    forward(w, layers, x, index[c, s : s + n], a, logits(layers, d, n, 0))
    norms(w, layers, lengths[c, s : s + n], y, losses, at, (a, d), squares, False)
    scales(squares[:n], clip, factors)
    summed(layers, factors[:n], (a, d), into)


@machine_code
def behind(
    w: Any,
    layers: Any,
    first: Any,
    y: Any,
    losses: Any,
    at: Any,
    room: Any,
    clip: float,
    into: Any,
) -> None:
    """The same of layers behind a first one, to whose coefficients its clipped rows are added.

    ``first``: what ``loops.Coefficients`` knows, in this order, lengths as below, and the rate.
    """
    (z, index, G, local, rows, seen, many, marks), lengths, rate = first
    (c, s, n), (a, d, squares, factors), size = at, room, layers[0, 1]
    places, q, met = (index[c, s : s + n], local[c, s : s + n]), np.uint64(size), a[: n * size]
    by, before = (z.dtype.type(1), z.dtype.type(-rate)), d[: n * size]
    less_rows(z.reshape(-1), G[c], rows[c].reshape(-1), places, seen[c, : many[c]], by, q, met)
    relu(met)
    through(w, layers, a, n, logits(layers, d, n, size))
    norms(w, layers, lengths[c, s : s + n], y, losses, at, (a, d), squares, True)
    scales(squares[:n], clip, factors)
    scaled(before, factors[:n], size)
    many[c] = add_to(rows[c], places[1], before, seen[c], many[c], marks[c])
    summed(layers, factors[:n], (a, d[n * size :]), into)


@machine_code
def logits(layers: Any, d: Any, n: int, size: int) -> Any:
    """The place of what the last layer puts out, behind gradients of the others' outputs.

    ``size``: outputs of a layer before these, if there is one.
    """
    begin = n * size
    for m in range(len(layers) - 1):
        begin += n * layers[m, 0]
    return d[begin : begin + n * layers[len(layers) - 1, 0]]


@machine_code
def scales(squares: Any, clip: float, factors: Any) -> None:
    """``PrivateSteps.factors`` of squared norms, ``rounded`` to the type of ``factors``."""
    least = np.finfo(factors.dtype).tiny
    for i in range(len(squares)):
        found = 0.0
        if math.isfinite(squares[i]):
            found = min(clip * (1.0 / math.sqrt(squares[i])), 1.0) if squares[i] > 0 else 1.0
        factors[i] = found
        if factors[i] < least:
            factors[i] = 0


@machine_code
def norms(
    w: Any,
    layers: Any,
    lengths: Any,
    y: Any,
    losses: Any,
    at: Any,
    room: Any,
    squares: Any,
    passes: bool,
) -> None:
    """Loss, backward and squared norms, once logits are in their place.

    ``lengths``: of what the very first layer takes, squared, and one more if it has a bias. ``room``: for
    what each layer takes, one behind the other, and for the gradient of what it puts out. ``passes``: the
    very first is before these; the gradient of what it puts out comes before theirs.
    """
    (c, s, n), (a, d), wide = at, room, layers[0, 1] if passes else 0
    C, z = layers[len(layers) - 1, 0], logits(layers, d, n, wide)
    for i in range(n):
        losses[c, s + i, 0] = closed(z[i * C : (i + 1) * C], y[c, s + i, 0], z.dtype.type(1))
        squares[i] = 0.0
    ends, taken = n * wide, 0
    for m in range(len(layers)):
        ends += n * layers[m, 0]
        taken += n * layers[m, 1]
    for m in range(len(layers) - 1, -1, -1):
        size, into, weight, bias = layers[m]
        ends -= n * size
        taken -= n * into
        g, seen, given = (
            d[ends : ends + n * size],
            a[taken : taken + n * into],
            m == 0 and not passes,
        )
        for i in range(n):
            long = lengths[i]
            if not given:
                long = squared(seen[i * into : (i + 1) * into]) + (1.0 if bias >= 0 else 0.0)
            squares[i] += squared(g[i * size : (i + 1) * size]) * long
        if not given:  # the layer before puts out what this one takes
            before = d[ends - n * into : ends]
            for k in range(n * into):
                before[k] = 0
            down(g, w[weight:], (n, size, into), before)
            masked(before, seen)
    if passes:
        for i in range(n):
            squares[i] += squared(d[i * wide : (i + 1) * wide]) * lengths[i]


@machine_code
def squared(row: Any) -> float:
    """The sum of the squares, in float64."""
    total = 0.0
    for k in range(len(row)):
        total += np.float64(row[k]) * np.float64(row[k])
    return total


@machine_code
def scaled(rows: Any, factors: Any, size: int) -> None:
    """``tree.scaled_rows`` of rows of so many numbers, in place."""
    least = np.finfo(rows.dtype).tiny
    for i in range(len(factors)):
        for k in range(i * size, (i + 1) * size):
            v = rows[k] * factors[i]
            rows[k] = v if abs(v) > least else 0  # what is not a number is not


@machine_code
def summed(layers: Any, factors: Any, room: Any, into: Any) -> None:
    """The sum of gradients times factors; of factor 0 nothing is left."""
    (a, d), n = room, len(factors)
    taken, ends = 0, 0
    for m in range(len(layers)):
        size, wide, weight, bias = layers[m]
        g, seen = d[ends : ends + n * size], a[taken : taken + n * wide]
        scaled(g, factors, size)
        for i in range(n):
            if factors[i] == 0:
                seen[i * wide : (i + 1) * wide] = 0
        end = bias + size if bias >= 0 else bias
        gradient(g, seen, (n, size, wide), into[weight:], into[bias:end])
        taken += n * wide
        ends += n * size
