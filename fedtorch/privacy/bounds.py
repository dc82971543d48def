"""Opacus's two accountants, wrapped: an upper bound on epsilon, or inf, whatever they are asked.

The one file that talks to Opacus. A run is a tuple of (noise, rate, steps): Gaussian releases, each over a
Poisson sample of the units.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from fedtorch.privacy.gaussian import gaussian_epsilon, sampled_delta

Run = tuple[tuple[float, float, int], ...]

PRV_ERROR = 0.01
"""How far the PRV bound may lie above the exact epsilon, for epsilons from 0.2 to 20; below and above,
a twentieth and a two-thousandth of epsilon. It is part of the figure returned."""

PRV_POINTS = 2_500_000
"""Grid points a PRV computation may use (a few seconds); beyond, the error is widened."""

LEAST = 0.01
"""Sampled runs are not priced below this; only the closed form without sampling is."""


def unsampled(run: Run, delta: float) -> float:
    """Exact epsilon if every unit were in every release.

    An upper bound with sampling too: leaving units out at random never adds to what a release tells.
    """
    return gaussian_epsilon(1 / math.sqrt(sum(t / s / s for s, _, t in run)), delta)


def rdp(run: Run, delta: float) -> float:
    """Opacus's RDP bound, with larger orders than its default, which small epsilons need."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    try:
        total = sum(renyi(s, q) * t for s, q, t in run)
        with quiet():
            found = float(get_privacy_spent(orders=orders(), rdp=total, delta=delta)[0])
    except (ArithmeticError, ValueError):
        return math.inf
    return math.inf if math.isnan(found) else max(0.0, found)


def prv(run: Run, delta: float) -> float:
    """Opacus's PRV bound (Gopi et al. 2021); inf where it cannot be computed or would take too long.

    The grid is chosen here and not by Opacus, from bounds that are known already: same rule, same mesh,
    but its cost can be seen before it is paid. It is that of the next power of two of steps, so that
    a run that asks after every round pays for a grid only now and then (a finer one errs less).
    """
    from opacus.accountants.analysis import prv as opacus

    bound = _quick(run, delta)
    if bound <= LEAST:  # nothing to gain
        return math.inf
    slack, error = delta / 1000, max(min(PRV_ERROR, bound / 20), min(bound / 2000, 0.5))
    for room in (tuple((s, q, 1 << (t - 1).bit_length()) for s, q, t in run), run):
        steps = sum(t for _, _, t in room)
        one = max(_quick(((s, q, 1),), slack / (8 * steps)) for s, q, _ in run)
        reach = max(_quick(room, slack / 4), one, error) + 3
        per_error = math.sqrt(steps * math.log(12 / slack) / 2)
        points = 2 * reach * per_error / error * len(run)
        if points <= PRV_POINTS:
            break
    error *= max(1.0, points / PRV_POINTS)
    if not error <= min(0.9, max(bound / 20, PRV_ERROR)):
        return math.inf
    try:
        with quiet():
            parts = [_composed(s, q, t, reach, error / per_error) for s, q, t in run]
            whole = parts[0]
            if len(parts) > 1:
                whole = opacus.compose_heterogeneous(parts, [1] * len(parts))
            found = whole.compute_epsilon(delta, slack, error)[2]
            # what rounding in the transforms leaves below zero shows how much of the rest is rounding
            if 20 * -float(whole.pmf[whole.pmf < 0].sum()) > delta:
                return math.inf
    except (ArithmeticError, ValueError, RuntimeError, MemoryError):
        return math.inf
    # a run costs at least what its dearest step costs, which is known: less means the numbers broke down
    if not math.isfinite(found) or found < max(_one_step(s, q, delta) for s, q, _ in run):
        return math.inf
    return float(found)


def _composed(noise: float, rate: float, steps: int, reach: float, mesh: float) -> Any:
    """Privacy loss of ``steps`` equal releases on a grid, as one of Opacus's discrete variables."""
    import numpy
    from opacus.accountants.analysis.prv import DiscretePRV

    domain, first, spectrum = _spectrum(noise, rate, reach, mesh)
    pmf = numpy.fft.irfft(_power(spectrum, steps), domain.size)
    # place i of a sum of t losses is worth t t_min + i dt, and the grid is a circle: turn it to where
    # place 0 is worth t_min again
    pmf = numpy.roll(pmf, (steps - 1) * first % domain.size)
    return DiscretePRV(pmf=pmf, domain=domain.shift_right(domain.shifts * (steps - 1)))


def _power(x: Any, n: int) -> Any:
    """x^n by squaring: NumPy's own power of complex numbers takes ten times as long."""
    out = None
    while n:
        if n & 1:
            out = x if out is None else out * x
        n >>= 1
        x = x * x if n else x
    return out


@lru_cache(maxsize=4)  # one may take 20 MB
def _spectrum(noise: float, rate: float, reach: float, mesh: float) -> Any:
    """Fourier transform of one release's privacy loss on a grid, and the grid."""
    import numpy
    from opacus.accountants.analysis import prv as opacus

    half = math.ceil(reach / mesh) + 1
    even = 1 << max(0, half.bit_length() - 4)  # a length with a large prime in it takes long
    half = -(-half // even) * even
    domain = opacus.Domain(-(half - 1) * mesh, half * mesh, 2 * half)
    exact = opacus.PoissonSubsampledGaussianPRV(rate, noise)
    cut = opacus.TruncatedPrivacyRandomVariable(exact, domain.t_min, domain.t_max)
    grid = opacus.discretize(cut, domain)
    return grid.domain, 1 - half, numpy.fft.rfft(grid.pmf)


@lru_cache(maxsize=4096)
def renyi(noise: float, rate: float) -> Any:
    """Renyi divergence of one release at each of ``orders()``, inf where it would take too long."""
    import numpy
    from opacus.accountants.analysis.rdp import compute_rdp

    # fractional orders are a series that hardly converges at rates near a half under much noise
    slow = rate < 1 and noise > 30 and noise * abs(math.log(1 / rate - 1)) < 8
    used = [o for o in orders() if not slow or float(o).is_integer()]
    with quiet():
        found = dict(
            zip(
                used, compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=used), strict=True
            )
        )
    return numpy.array([found.get(o, math.inf) for o in orders()])


@lru_cache(maxsize=1)
def orders() -> list[float]:
    """Opacus's default orders and larger ones."""
    from opacus.accountants import RDPAccountant

    more = [72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024]
    return [*RDPAccountant.DEFAULT_ALPHAS, *more]


@contextmanager
def quiet() -> Iterator[None]:
    """Without Opacus's advice on orders, and NumPy's and SciPy's on values that are checked afterwards."""
    import numpy

    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.filterwarnings(
            "ignore", r"Optimal order is the (largest|smallest) alpha", UserWarning
        )
        warnings.filterwarnings(
            "ignore", r"\s*The (maximum number|occurrence|integral|algorithm|extrap)", UserWarning
        )
        yield


def _quick(run: Run, delta: float) -> float:
    return min(unsampled(run, delta), rdp(run, delta))


def _one_step(noise: float, rate: float, delta: float) -> float:
    """Exact epsilon of one sampled release when a unit is removed, from below (0 beyond 700)."""
    low, high = 0.0, 1.0
    if sampled_delta(noise, low, rate) <= delta:
        return 0.0
    while sampled_delta(noise, high, rate) > delta:
        high *= 2
        if high > 700:
            return 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        over = sampled_delta(noise, middle, rate) > delta
        low, high = (middle, high) if over else (low, middle)
    return low
