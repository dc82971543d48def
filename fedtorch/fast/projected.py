"""Noise in every step for a first layer whose weights nobody writes down in between.

During a visit a client sees the noise N_t on its first layer's weights [in, out] only through its own
examples: as X N_t. Let Q be an orthonormal basis of the space of its rows, X^T = Q R. Then N_t = Q Z_t +
(1 - Q Q^T) N_t, where Z_t = Q^T N_t is N(0, s^2) of size [n, out], independent of the second part; X N_t
= R^T Z_t; and the second part is seen only in the end, summed over T steps, where it is (1 - Q Q^T)
sqrt(T) E for one E of the law of N_t. So drawing Z_1, ..., Z_T and E gives everything that is ever
computed the joint law it had, with n rows of noise a step in place of ``in``. Q comes from Householder's
QR, which is orthonormal whatever the rank: examples may repeat. ``docs/fast-path-math.md`` has the proof,
and what float32 leaves of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtorch.fast.chunk_data import Rows
from fedtorch.fast.dual import Dual
from fedtorch.fast.layers import Rule, squares
from fedtorch.fast.reader import Linear
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.tree import exact_sq_norms
from fedtorch.types import Params, Stack


class Projected(Dual):
    """The first layer of K clients under DP-SGD: w0, a row of coefficients for each example, and noise.

    Weights after some steps: w0 - c (X^T D + sum of N_t), c = learning rate over public batch size. A bias
    is an input that is always 1, with noise like any other.
    """

    def __init__(
        self,
        spec: Linear,
        weight: Tensor,
        bias: Tensor | None,
        rule: Rule,
        rows: Rows,
        places: tuple[Tensor, Tensor],
        known: "Known",
        private: PrivateSteps,
    ) -> None:
        """``places``: as for ``First``."""
        grams, self.bases = known.grams, known.bases
        super().__init__(spec, weight, bias, rule, len(grams), half=False)
        K, n = grams.shape[:2]
        self.n, self.private = n, private
        self.rate = rule.lr / private.divisor
        self.lengths = rows.sq_lengths[places[0]] + float(bias is not None)
        met = torch.cat([grams, known.rows], 2)
        self.seen = rows.ops.coefficients(self.known(rows), met, places)
        self.D = self.seen.rows
        bases = enumerate(known.bases)
        self.sums = [self.D[j, n : n + len(r)] for j, (_, r) in bases]  # each client's of its Z_t
        self.steps = [0] * K

    def forward(self, a: Tensor) -> Tensor:
        """``a`` [k, B] are the rows of this step, of which only the shape matters here."""
        self.now = slice(self.s, self.s + a.shape[1])
        k, B = a.shape
        return self.seen.outputs(self.s, k, B, rate=self.rate)

    def example_sq_norms(self, d: Tensor) -> Tensor:
        """Squared norm of each example's own gradient, [k, B]."""
        squares = exact_sq_norms(d.flatten(0, 1)).view(d.shape[:2])
        return squares * self.lengths[: len(d), self.now]

    def step(self, d: Tensor) -> None:
        """Clipped rows [k, B, out] are added to those of their examples, and noise to the others."""
        k, B = d.shape[:2]
        self.seen.add(self.s, d)
        for j in range(k):
            self.noise(j)
        self.s += B

    def noise(self, j: int) -> None:
        """A step's noise of client j."""
        if not self.steps[j]:  # it counts in all steps to come
            self.seen.count_all(j)
        self.private.noisy(self.sums[j].view(-1), j, part=True)
        self.steps[j] += 1

    def done(self) -> "Moved":
        """The changes of the copies after all, with the noise that no example saw.

        With X^T = Q R everything but that noise is Q times (R D + sum of Z_t); client after client, so that
        a client's numbers are still in the cache.
        """
        (out, inputs), K = self.spec.shape, len(self.D)
        weight = self.w0.new_zeros(K, out, inputs)
        bias = self.w0.new_zeros(K, out, int(self.b0 is not None))
        for j, (t, (q, r)) in enumerate(zip(self.steps, self.bases, strict=True)):
            for left in (weight[j], bias[j]):
                self.private.noisy(left.view(-1), j, math.sqrt(t), part=True)
            pixels, one = q[:inputs], q[inputs:]
            along = torch.addmm(self.sums[j], r, self.D[j, : r.shape[1]])
            along.addmm_(pixels.T, weight[j].T, alpha=-1).addmm_(one.T, bias[j].T, alpha=-1)
            for left, part in ((weight[j], pixels), (bias[j], one)):
                left.addmm_(along.T, part.T, beta=-self.rate, alpha=-self.rate)
        start = self.spec.named(self.w0, self.b0)
        return Moved(self.spec.named(weight, bias[..., 0] if self.spec.bias else None), start)


@dataclass(frozen=True)
class Known:
    """What depends on the clients' examples alone, a bias being an input that is always 1."""

    grams: Tensor
    """Their products with each other, [K, n, n], padded with zeros for clients with fewer."""
    bases: Sequence[tuple[Tensor, Tensor]]
    """Q [in (+ 1), m] and R [m, n] of each client."""
    rows: Tensor
    """The examples in the basis: R^T, [K, n, m], padded likewise."""


@dataclass(frozen=True)
class Moved:
    """What is left of a visit where the changes themselves are written down."""

    change: Stack
    start: Params

    def stack(self) -> Stack:
        """The copies."""
        return {n: v + self.start[n] for n, v in self.change.items()}

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Of all together."""
        return torch.stack([squares(v.flatten(1), upper) for v in self.change.values()]).sum(0)

    def weighted_sum(self, weight: Tensor, exact: bool) -> Params:
        """Who has weight 0 may hold NaN, which times 0 is NaN again."""
        on = weight != 0
        change = {n: v if on.all() else v[on] for n, v in self.change.items()}
        return {n: torch.tensordot(weight[on], v, 1) for n, v in change.items()}
