"""Closed forms: what one Gaussian or Laplace release costs, without any accountant.

``noise`` is the standard deviation of the Gaussian over the L2 sensitivity, or the scale of the Laplace
over the L1 sensitivity. T Gaussian releases at noise s cost what one costs at s / sqrt(T).
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch

ROOT_2 = math.sqrt(2)
HALVES = 2.0**27 + 1
"""What a float64 is multiplied by to be cut into halves (Dekker 1971)."""


def gaussian_delta(noise: float, epsilon: float) -> float:
    """Smallest delta of a Gaussian release at this epsilon >= 0.

    delta = Phi(1/(2s) - eps s) - e^eps Phi(-1/(2s) - eps s): Balle and Wang 2018, theorem 8. Exact for
    every epsilon, unlike the textbook sqrt(2 ln(1.25/delta)) / epsilon.
    """
    return math.exp(_log_delta(noise, epsilon))


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Smallest epsilon of a Gaussian release at this delta; inf without noise, never below the truth."""
    if noise == 0:
        return math.inf
    target = math.log(delta)
    if _log_delta(noise, 0.0) <= target:
        return 0.0
    high = 1.0
    while _log_delta(noise, high) > target:
        high *= 2
        if math.isinf(high):
            return math.inf
    return bisected(lambda e: _log_delta(noise, e) > target, 0.0, high)


def gaussian_noise(epsilon: float, delta: float) -> float:
    """Smallest noise whose Gaussian release is (epsilon, delta)-private, never below the truth."""
    target = math.log(delta)
    low, high = 1.0, 1.0
    while _log_delta(low, epsilon) <= target:
        low /= 2
    while _log_delta(high, epsilon) > target:
        high *= 2
    return bisected(lambda noise: _log_delta(noise, epsilon) > target, low, high)


def bisected(
    less: Callable[[float], bool], low: float, high: float, digits: float = 1e-14
) -> float:
    """Least number from ``low`` to ``high`` that will do, or a last digit more."""
    while high - low > digits * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if less(middle) else (low, middle)
    return high


def sampled_delta(noise: float, epsilon: float, rate: float) -> float:
    """Delta of one Poisson-sampled Gaussian release when a record is removed; 0 < rate <= 1.

    With c = e^eps the two densities cross at z = s^2 ln((c - 1 + q) / q) + 1/2, and delta is the mass that
    (1-q) N(0, s^2) + q N(1, s^2) has beyond it over c times that of N(0, s^2).
    """
    if noise == 0:
        return rate
    c = math.exp(epsilon)
    z = noise * noise * math.log((c - 1 + rate) / rate) + 0.5
    inside, outside = tail((z - 1) / noise), tail(z / noise)
    return max(0.0, rate * inside - (c - 1 + rate) * outside)


def laplace_epsilon(noise: float, rate: float = 1.0) -> float:
    """Pure epsilon of one Laplace release, Poisson-sampled at ``rate``; T releases cost T times that."""
    if noise == 0:
        return math.inf
    # ln(1 + q (e^eps - 1)), written so that a large epsilon does not overflow
    whole = 1 / noise
    return whole + math.log(rate + (1 - rate) * math.exp(-whole)) if rate < 1 else whole


def above(x: np.ndarray) -> np.ndarray:
    """Probability that a standard normal variable is above each ``x``."""
    return (
        torch.erfc(torch.as_tensor(x / ROOT_2)).numpy() / 2
    )  # torch.special.ndtr has no digit left beyond 8


def tail(x: float) -> float:
    """The same of one ``x``."""
    return math.erfc(x / ROOT_2) / 2


def quantile(p: float) -> float:
    """Below which a standard normal variable is with probability ``p``."""
    return NormalDist().inv_cdf(p)


def scaled_tail(x: float) -> float:
    """exp(x^2) erfc(x) for x >= 0, which neither overflows nor vanishes, to two units of the last digit.

    SciPy's has four, and takes a tenth of a second to read.
    """
    if x > 25:  # the asymptotic series, of which the ninth term is below 1e-17 there
        found = 1.0
        for k in range(15, 0, -2):
            found = 1 - k * found / (2 * x * x)
        return found / (x * math.sqrt(math.pi))
    square = x * x
    high = HALVES * x - (HALVES * x - x)
    low = x - high
    rounded = ((high * high - square) + 2 * high * low) + low * low
    return math.exp(square) * math.erfc(x) * (1 + rounded)


def _log_delta(noise: float, epsilon: float) -> float:
    if noise == 0:
        return 0.0
    a, b = 0.5 / noise - epsilon * noise, -0.5 / noise - epsilon * noise
    # e^eps phi(b) = phi(a): with the scaled tail both terms share the factor exp(-a^2 / 2), so nothing
    # overflows and no large exponents are subtracted
    second = scaled_tail(-b / ROOT_2) / 2
    if a > 0:
        delta = tail(-a) - second * math.exp(-a * a / 2)
        return math.log(delta) if delta > 0 else -math.inf
    rest = scaled_tail(-a / ROOT_2) / 2 - second
    return math.log(rest) - a * a / 2 if rest > 0 else -math.inf
