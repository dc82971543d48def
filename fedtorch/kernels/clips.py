"""A client's step of DP-SGD but for the noise, its parameters in one row: linear layers, ReLU between them.

Only to be imported where numba is installed.
"""

import math
from typing import Any

import numpy as np

from fedtorch.kernels.closing import gradient as closed
from fedtorch.kernels.compile import machine_code
from fedtorch.kernels.copies import down, gradient
from fedtorch.kernels.products import masked
from fedtorch.kernels.visits import forward


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
    (a, d, squares, factors), n = room, at[2]
    norms(w, layers, inputs, y, losses, at, (a, d), squares)
    scales(squares[:n], clip, factors)
    summed(layers, factors[:n], (a, d), into)


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
    w: Any, layers: Any, inputs: Any, y: Any, losses: Any, at: Any, room: Any, squares: Any
) -> None:
    """Forward, backward and squared norms; ``inputs``: the examples, those of each step, and their lengths.

    ``room``: for what each layer takes, one behind the other, and for the gradient of what it puts out.
    """
    (x, index, lengths), (c, s, n), (a, d) = inputs, at, room
    rows, behind, taken = index[c, s : s + n], 0, 0
    for m in range(len(layers)):
        behind += n * layers[m, 0]
        taken += n * layers[m, 1]
    C = layers[len(layers) - 1, 0]
    z = d[behind - n * C : behind]
    forward(w, layers, x, rows, a, z)
    for i in range(n):
        losses[c, s + i, 0] = closed(z[i * C : (i + 1) * C], y[c, s + i, 0], z.dtype.type(1))
        squares[i] = 0.0
    for m in range(len(layers) - 1, -1, -1):
        size, into, weight, bias = layers[m]
        behind -= n * size
        taken -= n * into
        g, seen = d[behind : behind + n * size], a[taken : taken + n * into]
        for i in range(n):
            long = squared(seen[i * into : (i + 1) * into]) if m else lengths[rows[i]]
            long += 1.0 if bias >= 0 else 0.0
            squares[i] += squared(g[i * size : (i + 1) * size]) * long
        if m:  # the layer before puts out what this one takes
            before = d[behind - n * into : behind]
            for k in range(n * into):
                before[k] = 0
            down(g, w[weight:], (n, size, into), before)
            masked(before, seen)


@machine_code
def squared(row: Any) -> float:
    """The sum of the squares, in float64."""
    total = 0.0
    for k in range(len(row)):
        total += np.float64(row[k]) * np.float64(row[k])
    return total


@machine_code
def summed(layers: Any, factors: Any, room: Any, into: Any) -> None:
    """The sum of gradients times factors: ``tree.scaled_rows`` first; of factor 0 nothing is left."""
    (a, d), n = room, len(factors)
    least, taken, behind = np.finfo(d.dtype).tiny, 0, 0
    for m in range(len(layers)):
        size, wide, weight, bias = layers[m]
        g, seen = d[behind : behind + n * size], a[taken : taken + n * wide]
        for i in range(n):
            for k in range(i * size, (i + 1) * size):
                v = g[k] * factors[i]
                g[k] = v if abs(v) > least else 0  # what is not a number is not
            if factors[i] == 0:
                seen[i * wide : (i + 1) * wide] = 0
        end = bias + size if bias >= 0 else bias
        gradient(g, seen, (n, size, wide), into[weight:], into[bias:end])
        taken += n * wide
        behind += n * size
