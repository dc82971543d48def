"""Several units at once, or one in place of another: the worst pair of outputs of one sampled release.

Each of k units moves the sum by a vector no longer than 1 and is in it by a coin of its own. With the draws
of all others given, the output is a mixture of Gaussians, one for each subset that may be in. Whatever the
vectors are, no test tells the two mixtures apart better than where all vectors lie along one line, away
from the others' sum: a hockey stick is the mean of a convex function of a sum of log-normals under the
other law, and by Kahane's inequality (1985) such a mean rises with each covariance, which here is the
product of two vectors and largest along a line (Ganesh 2024, arXiv:2401.10294, for groups that are added
or removed). For a unit v replaced by w, shift v to 0: the stick compares N(0) with a mixture of N(-v), no
longer than 1, and N(w - v), no longer than 2. Worst is w = -v, so that the pair is

    (1 - q) N(0, s^2) + q N(1, s^2)   and   (1 - q) N(0, s^2) + q N(-1, s^2).

Such pairs compose over releases (Zhu, Dong and Wang 2022, theorem 10).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fedtorch.privacy.accounting.gaussian import above

REPLACED = 0
"""In place of a number of units: one whose data are others. k: k units removed; -k: k units added."""

FAR = 13.0
"""Standard deviations beyond which nothing is counted: a chance of 1e-38."""

POINTS = 40_000
"""Of an integral, at most; orders that would need more are not tried."""


class Mixture(NamedTuple):
    """Of N(place, s^2) with these weights, which add up to 1."""

    places: tuple[float, ...]
    weights: tuple[float, ...]


class Mixed(NamedTuple):
    """Two mixtures on a line, P further right: ln(P / Q) rises from left to right."""

    noise: float
    p: Mixture
    q: Mixture

    @property
    def ends(self) -> tuple[float, float]:
        """Where P begins and ends, but for what is not counted."""
        far = FAR * self.noise
        return min(self.p.places) - far, max(self.p.places) + far

    def loss(self, z: Any) -> Any:
        """The logarithm of P / Q at each ``z``."""
        return self._log(self.p, z) - self._log(self.q, z)

    def slope(self, z: Any) -> Any:
        """By how much ``loss`` rises."""
        return (self._mean_place(self.p, z) - self._mean_place(self.q, z)) / self.noise**2

    def at(self, loss: Any) -> Any:
        """Where ``loss`` is so much: on a grid first, then by Newton's method inside a cell of it."""
        cells = np.linspace(*self.ends, 8192)
        known = np.maximum.accumulate(self.loss(cells))
        place = np.clip(np.searchsorted(known, loss) - 1, 0, len(cells) - 2)
        low, high = cells[place], cells[place + 1]
        z = np.clip(np.interp(loss, known, cells), low, high)
        for _ in range(3):
            with np.errstate(all="ignore"):  # flat ends
                step = (self.loss(z) - loss) / self.slope(z)
            z = np.clip(z - np.where(np.isfinite(step), step, 0.0), low, high)
        return z

    def beyond(self, loss: Any) -> Any:
        """Probability of a larger loss under P."""
        least, most = (float(x) for x in self.loss(np.array(self.ends)))
        z = self.at(np.clip(loss, least, most))
        tails = sum(
            w * above((z - a) / self.noise)
            for a, w in zip(self.p.places, self.p.weights, strict=True)
        )
        return np.where(loss < least, 1.0, np.where(loss > most, 0.0, tails))

    def mean(self, low: float, high: float) -> float:
        """Mean of the losses between ``low`` and ``high`` under P, by Gauss's rule on short pieces."""
        ends = self.at(np.clip([low, high], *self.loss(np.array(self.ends))))
        widest = max(map(abs, (*self.p.places, *self.q.places)))
        width = 2 * self.noise * min(1.0, 2 * self.noise / widest)
        cuts = np.linspace(ends[0], ends[1], math.ceil((ends[1] - ends[0]) / width) + 2)
        x, w = np.polynomial.legendre.leggauss(32)
        halves = np.diff(cuts)[:, None] / 2
        z = cuts[:-1, None] + halves * (x + 1)
        weights = np.exp(self._log(self.p, z) - z * z / 2 / self.noise**2) * halves * w
        return float((weights * self.loss(z)).sum() / weights.sum())

    def log_moments(self, orders: Any) -> Any:
        """Ln E (P / Q)^a under Q for each order a, inf where it would take too many points.

        The trapezoid rule on an analytic function that vanishes at both ends: its singularities are pi s^2
        over the widest place away from the line, so that it errs by less than e^-39 of the whole.
        """
        s, widest = self.noise, max(map(abs, (*self.p.places, *self.q.places)))
        step = min(s / 4, s * s / 2 / widest)
        found = np.full(len(orders), math.inf)
        spread = max(self.p.places) - min(self.q.places)
        fits = [(a * spread + 2 * FAR * s + widest) / step <= POINTS for a in orders]
        if not any(fits):
            return found
        least = min(*self.p.places, *self.q.places) - FAR * s
        most = max(a for a, fit in zip(orders, fits, strict=True) if fit) * spread + FAR * s
        z = np.arange(least, most, step)
        loss, base = self.loss(z), self._log(self.q, z) - z * z / 2 / s / s
        for i in np.flatnonzero(fits):
            # an order's mass ends where its own largest place does
            many = math.ceil((orders[i] * spread + FAR * s - least) / step)
            logs = orders[i] * loss[:many] + base[:many]
            top = float(logs.max())
            total = float(np.exp(logs - top).sum()) * step / s / math.sqrt(2 * math.pi)
            found[i] = top + math.log(total) + 1e-13  # rounding
        return found

    def _log(self, mixture: Mixture, z: Any) -> Any:
        """Logarithm of a mixture's density over that of N(0, s^2)."""
        terms = self._terms(mixture, z)
        return terms[0] if len(terms) == 1 else np.logaddexp.reduce(terms)

    def _mean_place(self, mixture: Mixture, z: Any) -> Any:
        """Mean of the places, each weighed by how much of the density at ``z`` is its own."""
        terms = self._terms(mixture, z)
        shares = np.exp(terms - np.max(terms, axis=0))
        return np.tensordot(np.array(mixture.places), shares, 1) / shares.sum(0)

    def _terms(self, mixture: Mixture, z: Any) -> Any:
        z = np.asarray(z, dtype=float)
        places = np.array(mixture.places).reshape(-1, *[1] * z.ndim)
        weights = np.array(mixture.weights).reshape(places.shape)
        return np.log(weights) + (2 * places * z - places**2) / (2 * self.noise**2)


@lru_cache(maxsize=256)
def worst_pair(noise: float, rate: float, units: int) -> Mixed:
    """The worst pair for so many ``units``; see ``REPLACED``."""
    if units == REPLACED:
        coin = (1 - rate, rate) if rate < 1 else (1.0,)
        here, there = ((0.0, 1.0), (0.0, -1.0)) if rate < 1 else ((1.0,), (-1.0,))
        return Mixed(noise, Mixture(here, coin), Mixture(there, coin))
    k, sign = abs(units), math.copysign(1.0, units)
    inside = range(k + 1) if rate < 1 else (k,)
    known = [(sign * j, math.comb(k, j) * rate**j * (1 - rate) ** (k - j)) for j in inside]
    kept = [(a, w) for a, w in known if w > 0]
    group = Mixture(tuple(a for a, _ in kept), tuple(w for _, w in kept))
    nobody = Mixture((0.0,), (1.0,))
    # units that are added: the mixture is the second law, and the line is turned round
    return Mixed(noise, group, nobody) if units > 0 else Mixed(noise, nobody, group)


def moved(units: int) -> int:
    """By how much the sum moves where everybody is in it."""
    return 2 if units == REPLACED else abs(units)


@lru_cache(maxsize=1024)
def mixed_renyi(noise: float, rate: float, units: int, orders: tuple[float, ...]) -> Any:
    """Renyi divergence of one release between the two laws, at each order."""
    a = np.array(orders)
    if rate == 1:
        return a * moved(units) ** 2 / noise / noise / 2
    return worst_pair(noise, rate, units).log_moments(a) / (a - 1)


def both_ways(units: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Units of each part of a run, removed and added; a replacement is the same both ways."""
    there = tuple(units)
    return (there,) if not any(there) else (there, tuple(-u for u in there))
