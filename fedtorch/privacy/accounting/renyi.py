"""Renyi divergence of Poisson-sampled Gaussian releases, and the epsilon that follows from it."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fedtorch.privacy.accounting.mixed import mixed_renyi

FRACTIONS = 0.03
"""Noise below which (epsilon is in the hundreds there) only whole orders are tried."""


@lru_cache(maxsize=1)
def orders() -> Any:
    """Opacus's default orders, and larger ones, which small epsilons need."""
    more = [72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024]
    return np.array([*(1 + x / 10 for x in range(1, 100)), *range(12, 64), *more], dtype=float)


@lru_cache(maxsize=4096)
def renyi(noise: float, rate: float, units: int = 1) -> Any:
    """Divergence of one release from the same without one record, at each of ``orders()``.

    ``units``: without several, or with another in its place (``mixed``).

    A = E (1 - q + q e^v)^a over v = (2z - 1) / (2 s^2) with z from N(0, s^2): Mironov, Talwar and Zhang
    2019 (arXiv:1908.10530), who show that the other direction is never larger. The divergence is
    ln A / (a - 1); A - 1 is summed without ever holding A, of which it may be a tiny part.
    """
    a = orders()
    if units != 1:
        return mixed_renyi(noise, rate, units, tuple(a.tolist()))
    if rate == 1:
        return a / noise / noise / 2
    whole = a == np.floor(a)
    log_rest = np.full(len(a), math.inf)
    with np.errstate(all="ignore"):
        log_rest[whole] = _whole(noise, rate, tuple(a[whole].astype(int).tolist()))
        if noise >= FRACTIONS:
            log_rest[~whole] = _between(noise, rate, a[~whole])
        found = np.logaddexp(0, log_rest) / (a - 1)
    return np.where(np.isnan(found), math.inf, found)


def renyi_at(noise: float, rate: float, orders: tuple[int, ...]) -> Any:
    """The same at whole orders of the caller's."""
    a = np.array(orders, dtype=float)
    if rate == 1:
        return a / noise / noise / 2
    with np.errstate(all="ignore"):
        found = np.logaddexp(0, _whole(noise, rate, orders)) / (a - 1)
    return np.where(np.isnan(found), math.inf, found)


def renyi_deltas(divergence: Any, epsilons: Sequence[float]) -> list[float]:
    """The same bound the other way round: delta at each epsilon."""
    a = orders()
    logs = [(a - 1) * (divergence - e + np.log((a - 1) / a)) - np.log(a) for e in epsilons]
    return [min(1.0, math.exp(min(0.0, float(at.min())))) for at in logs]


def renyi_epsilon(divergence: Any, delta: float, a: Any = None) -> float:
    """Epsilon at ``delta`` from the divergence at each order: Balle et al. 2020, theorem 21.

    ``a``: the orders; none: ``orders()``.
    """
    a = orders() if a is None else a
    found = divergence - (math.log(delta) + np.log(a)) / (a - 1) + np.log((a - 1) / a)
    return max(0.0, float(found.min()))


@lru_cache(maxsize=2)
def _terms(whole: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    """Of every whole order a, for i from 2 to a: where a starts, ln (a over i), i, a - i; flat."""
    a = np.array(whole)
    i = np.concatenate([np.arange(2, n + 1) for n in a])
    n = np.repeat(a, a - 1)
    factorial = np.array([math.lgamma(m + 1) for m in range(max(a) + 1)])
    binomial = factorial[n] - factorial[i] - factorial[n - i]
    return np.concatenate([[0], np.cumsum(a - 1)[:-1]]), binomial, i, n - i


def _whole(noise: float, rate: float, whole: tuple[int, ...]) -> Any:
    """ln(A - 1) at whole orders: the binomial sum, in which 1 is the sum of the same without e^x."""
    starts, binomial, i, rest = _terms(whole)
    x = (i * i - i) / 2 / noise / noise
    logs = binomial + i * math.log(rate) + rest * math.log1p(-rate) + x + np.log(-np.expm1(-x))
    top = np.maximum.reduceat(logs, starts)
    counts = np.diff([*starts, len(logs)])
    return top + np.log(np.add.reduceat(np.exp(logs - np.repeat(top, counts)), starts))


def _between(noise: float, rate: float, orders: Any) -> list[float]:
    """ln(A - 1) at any orders: the integral of r^a - 1 - a (r - 1), never negative, as E r = 1.

    The trapezoid rule on an analytic function that vanishes at both ends errs by exp(-2 pi d / step),
    where d = pi s (in u = z / s) is the distance of its singularities from the real line: below 1e-16.
    """
    step = min(0.25, noise / 2)
    # orders begin at the same place and end at their own, so that what does not hang on them is there once
    u = np.arange(-12.0, float(orders.max()) / noise + 12.0, step)
    v = u / noise - 0.5 / noise / noise
    w = rate * np.expm1(np.minimum(v, 700.0))  # r - 1
    log_r = np.where(v < 1, np.log1p(w), np.logaddexp(math.log1p(-rate), math.log(rate) + v))
    order = orders[:, None]
    # three ways to write the same, for r as near 1 as makes no difference in r^a, near 1, and beyond the
    # range of floats
    series = np.ones((len(orders), len(w)))
    for j in range(7, 1, -1):
        series = 1 + series * (order - j) / (j + 1) * w
    tiny = 2 * np.log(abs(w)) + np.log(order * (order - 1) / 2 * series)
    near = np.log(np.expm1(order * log_r) - order * w)
    far = order * log_r + np.log1p(
        (order - 1) * np.exp(-order * log_r) - order * np.exp(-(order - 1) * log_r)
    )
    logs = np.where(order * abs(w) < 0.02, tiny, np.where(v < 1, near, far)) - u * u / 2
    found = []
    for a, own in zip(orders.tolist(), logs, strict=True):
        own = own[: math.ceil((a / noise + 24.0) / step)]
        own = own[~np.isnan(own)]
        top = float(own.max())
        total = float(np.exp(own - top).sum())
        found.append(top + math.log(total * step / math.sqrt(2 * math.pi)))
    return found
