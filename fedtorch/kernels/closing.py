"""A whole step of a small last layer, of which every client has its own copy, before cross entropy.

Ten rows against ten outputs are so little that a library spends longer on its dozen calls than on the
numbers. Only to be imported where numba is installed.
"""

import math
from typing import Any

import numpy as np

from fedtorch.kernels.compile import machine_code
from fedtorch.kernels.products import (
    ENDS,
    W4,
    Place,
    W,
    counted,
    less_four,
    less_one,
    masked,
    row_products,
)

MASK = ENDS["mask"]


@machine_code
def step(
    a: Any, layer: Any, given: Any, factor: Any, losses: Any, s: int, by: Any, out: Any
) -> None:
    """What ``ops.closing`` does; ``layer``: weights and biases, none or [K, 1, C]; ``by``: keep, end.

    ``given``: labels and scale; the gradient of the inputs is written to ``out``.
    """
    (weight, bias), (y, scale) = layer, given
    k, B, p = a.shape
    C, q = weight.shape[1], np.uint64(p)
    rows, outputs = counted(B), counted(C)
    one, keep = a.dtype.type(1), a.dtype.type(by[0])
    d, turned = np.empty((B, C), a.dtype), np.empty((C, B), a.dtype)
    for c in range(k):
        ac, wc, to = a[c].reshape(-1), weight[c].reshape(-1), out[c].reshape(-1)
        row_products(ac, wc, q, (B, C), d.reshape(-1), (0, C), a.dtype.type(0))
        for i in range(B):
            if len(bias):  # number by number: rows as wholes would take seconds to compile
                for j in range(C):
                    d[i, j] += bias[c, 0, j]
            here = scale[c, s + i, 0] > 0
            loss = gradient(d[i], y[c, s + i, 0], factor[c, s + i, 0])
            losses[c, s + i, 0] = loss if here else 0
            for j in range(C):
                if not here:  # whatever is there
                    d[i, j] = 0
                turned[j, i] = d[i, j]
        for j in range(len(to)):
            to[j] = 0
        _combine(to, d, wc, outputs, (one, one), q)
        if by[1] == MASK:
            masked(to, ac)
        _combine(wc, turned, ac, rows, (keep, -one), q)
        if len(bias):
            _move(bias[c, 0], turned, keep)


@machine_code
def _move(bias: Any, turned: Any, keep: Any) -> None:
    """A step of the biases."""
    for j in range(len(bias)):
        total = bias.dtype.type(0)
        for i in range(turned.shape[1]):
            total += turned[j, i]
        bias[j] = keep * bias[j] - total


@machine_code
def gradient(z: Any, label: int, factor: Any) -> Any:
    """Softmax minus one-hot times factor, in the logits' place; returns the log of the label's share."""
    top = z[0]
    for j in range(1, len(z)):
        top = max(top, z[j])
    at, total = z[label] - top, z.dtype.type(0)
    for j in range(len(z)):
        z[j] = math.exp(z[j] - top)
        total += z[j]
    for j in range(len(z)):
        z[j] = z[j] / total * factor
    z[label] -= factor
    return at - math.log(total)


@machine_code
def _combine(to: Any, G: Any, Y: Any, some: Any, by: Any, q: Place) -> None:
    """Rows [R, q] <- keep times themselves + rate G Y, flat; G [R, J], Y [J, q]; ``by``: keep, rate."""
    R = len(G)
    t = np.uint64(0)
    while t < q:
        for i in range(0, R, 2):
            other = min(i + 1, R - 1)
            at = np.uint64(i) * q + t, np.uint64(other) * q + t
            if t + W4 <= q:
                less_four(to, at, to, at, G[i], G[other], Y, t, q, some, by)
            else:
                less_one(to, at, to, at, G[i], G[other], Y, t, q, some, by, min(q - t, W))
        t += W4 if t + W4 <= q else W
