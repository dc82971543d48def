"""Upper bounds on epsilon: without sampling, by Renyi divergence (RDP), by privacy loss on a grid (PRV).

Whatever they are asked they return a bound that holds, or inf. A run is a tuple of (noise, rate, steps):
Gaussian releases, each over a Poisson sample of the units. Tests hold all three to Opacus's and Google's
accountants.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np

from fedtorch.privacy.accounting.gaussian import gaussian_delta, gaussian_epsilon, sampled_delta
from fedtorch.privacy.accounting.mixed import moved
from fedtorch.privacy.accounting.renyi import orders, renyi, renyi_deltas, renyi_epsilon
from fedtorch.privacy.accounting.spectrum import Release, deltas_of, epsilon_of, release

Part = tuple[float, float, int] | tuple[float, float, int, int]
"""Noise, rate, steps, and how many units are removed, added or replaced (``mixed``); none: one removed."""

Run = tuple[Part, ...]

PRV_ERROR = 0.01
"""How far the PRV bound lies above the exact epsilon, give or take what the grid rounds (as much again
at most, a tenth of it as a rule), for epsilons from 0.2 to 20; below and above, at most a twentieth and a
two-thousandth of epsilon. It is part of the figure returned."""

PRV_POINTS = 2_500_000
"""Grid points a PRV computation may use (a fraction of a second); beyond, the error is widened."""

FAR = 1e-8
"""Deltas below this are looked at with tilted masses too: rounding weighs in deltas of 1e-10 as it is."""

LEAST = 0.01
"""Sampled runs are not priced below this; only the closed form without sampling is."""

CLEARLY = 1 + 1e-9
"""Times as much is more whatever rounding does."""

LEAST_STEPS = 64
"""Runs of fewer steps are priced on the grid of this many."""


@lru_cache(maxsize=4096)
def unsampled(run: Run, delta: float) -> float:
    """Exact epsilon if every unit were in every release.

    An upper bound with sampling too: leaving units out at random never adds to what a release tells.
    """
    return gaussian_epsilon(1 / shift(run), delta)


def capped(run: Run, delta: float, bound: float) -> float:
    """The smaller of ``unsampled`` and another bound: seldom the first, which then is not computed."""
    noise = 1 / shift(run)
    # beyond all rounding its delta is too large there: so is its epsilon
    if gaussian_delta(noise, bound * CLEARLY) > delta * CLEARLY:
        return bound
    return min(unsampled(run, delta), bound)


def shift(run: Run) -> float:
    """By how many standard deviations the units move all releases, if they were in every one."""
    return math.sqrt(sum(t / s / s * moved(u) ** 2 for s, _, t, u in _whole(run)))


def _whole(run: Run) -> Iterator[tuple[float, float, int, int]]:
    for s, q, t, *units in run:
        yield s, q, t, int(units[0]) if units else 1


@lru_cache(maxsize=4096)
def rdp(run: Run, delta: float) -> float:
    """By Renyi divergence."""
    try:
        return renyi_epsilon(sum(renyi(s, q, u) * t for s, q, t, u in _whole(run)), delta)
    except ArithmeticError:
        return math.inf


@lru_cache(maxsize=4096)
def prv(run: Run, delta: float) -> float:
    """By privacy loss on a grid (Gopi et al. 2021); inf where it cannot be computed or would take long."""
    best, bound = math.inf, _quick(run, delta)
    while bound > LEAST:  # else there is nothing to gain
        found = _on_grid(run, delta, bound)
        best = min(best, found)
        # where the quick bound was far above epsilon, so is the error that it allowed
        if not (math.isfinite(found) and _error(found) <= _error(bound) / 2):
            break
        bound = found
    return best


def _on_grid(run: Run, delta: float, bound: float) -> float:
    """PRV with the error that fits an epsilon below ``bound``."""
    error, parts = _parts(run, delta, bound)
    if not parts:
        return math.inf
    try:
        # below 0 where delta is reached without any epsilon
        found = epsilon_of(parts, delta, delta / 1000, bound)
        if delta < FAR or math.isinf(found):  # rounding could make up much of delta, or more
            _, tilted = _parts(run, delta, bound, _tilt(run, delta))
            found = min(found, epsilon_of(tilted, delta, delta / 1000, bound)) if tilted else found
        found = max(0.0, found) + error
    except (ArithmeticError, ValueError, MemoryError):
        return math.inf
    # a run costs at least what its dearest step costs, which is known: less means the numbers broke down
    if not math.isfinite(found) or found < max(_one_step(s, q, delta) for s, q, *_ in run):
        return math.inf
    return found


def _tilt(run: Run, delta: float) -> float:
    """The Renyi order that is best for this delta, less 1: most of the tilted mass is near its epsilon."""
    a = orders()
    divergence = sum(renyi(s, q, u) * t for s, q, t, u in _whole(run))
    by_order = divergence - (math.log(delta) + np.log(a)) / (a - 1) + np.log((a - 1) / a)
    return float(a[np.nanargmin(by_order)]) - 1


def _parts(
    run: Run, delta: float, bound: float, tilt: float = 0.0
) -> tuple[float, list[tuple[Release, int]]]:
    """The releases on their grid, with the error for an epsilon below ``bound``; none: no grid does."""
    error, reach, mesh, before = _grid(run, delta, bound)
    if not error <= min(0.9, max(bound / 20, PRV_ERROR)):
        return error, []
    try:
        made = zip(_whole(run), before, strict=True)
        return error, [(_release(s, q, reach, mesh, n + 1, u, tilt), t) for (s, q, t, u), n in made]
    except (ArithmeticError, ValueError, MemoryError):
        return error, []


def deltas(run: Run, delta: float, epsilons: Sequence[float], accountant: str) -> list[float]:
    """Delta of the run at each epsilon, from above; finest about ``delta``.

    The smallest of the same three bounds: they hold at every epsilon.
    """
    noise = 1 / shift(run)
    found = [gaussian_delta(noise, e) for e in epsilons]
    if all(q == 1 for _, q, _, _ in _whole(run)):
        return found
    divergence = sum(renyi(s, q, u) * t for s, q, t, u in _whole(run))
    found = [*map(min, found, renyi_deltas(divergence, epsilons))]
    if accountant == "prv":
        error, parts = _parts(run, delta, min(prv(run, delta), _quick(run, delta)))
        if parts:
            with suppress(ArithmeticError, ValueError, MemoryError):
                below = [e - error for e in epsilons]
                found = [*map(min, found, deltas_of(parts, delta / 1000, below))]
    return found


def _error(bound: float) -> float:
    """Of a PRV figure below ``bound``; in powers of two, for few grids."""
    error = max(min(PRV_ERROR, bound / 20), min(bound / 2000, 0.5))
    return PRV_ERROR * 2.0 ** math.floor(math.log2(error / PRV_ERROR))


def _grid(run: Run, delta: float, bound: float) -> tuple[float, float, float, list[int]]:
    """Error, reach and mesh of the grid for this run, and the most steps of each part on the grid before.

    Mesh and reach are the paper's (its remark 5.6) for the next power of four of steps, so that a run that
    asks after every round pays for a grid only now and then: a finer and wider one errs less.
    """
    slack, error = delta / 1000, _error(bound)
    for base in (4, 2, 1):
        room = tuple((s, q, _room(t, base), u) for s, q, t, u in _whole(run))
        steps = sum(t for _, _, t, _ in room)
        one = max(_quick(((s, q, 1, u),), slack / (8 * steps)) for s, q, _, u in _whole(run))
        reach = max(_quick(room, slack / 4), one, error) + 3
        per_error = math.sqrt(steps * math.log(12 / slack) / 2)
        points = 2 * reach * per_error / error * len(run)
        if points <= PRV_POINTS:
            break
    error *= max(1.0, points / PRV_POINTS)
    factor = base if base > 1 else 4
    before = [0 if t <= LEAST_STEPS else _room(t, factor) // factor for _, _, t, *_ in run]
    return error, reach, error / per_error, before


def _room(steps: int, base: int) -> int:
    """The next power of ``base``, from LEAST_STEPS on; with base 1 the steps themselves."""
    room = LEAST_STEPS
    while base > 1 and room < steps:
        room *= base
    return room if base > 1 else steps


@lru_cache(maxsize=16)
def _release(
    noise: float, rate: float, reach: float, mesh: float, least: int, units: int, tilt: float
) -> Release:
    return release(noise, rate, reach, mesh, least, units, tilt)


def _quick(run: Run, delta: float) -> float:
    return capped(run, delta, rdp(run, delta))


@lru_cache(maxsize=4096)
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
