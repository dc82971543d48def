"""What a list of noised releases costs together: (epsilon, delta) of a whole run.

Neighbouring relation: one unit (an example, or a client) is added or removed. The one file that talks to
Opacus, whose accountants are wrapped so that no input makes them fail silently.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

from fedtorch.privacy.gaussian import (
    gaussian_epsilon,
    gaussian_noise,
    laplace_epsilon,
    sampled_delta,
)
from fedtorch.types import ConfigError

ACCOUNTANTS = ("prv", "rdp")

PRV_ERROR = 0.01
"""How far the PRV bound may lie above the exact epsilon, for epsilons from 0.2 to 20; below and above,
a twentieth and a two-thousandth of epsilon. It is part of the figure returned."""

PRV_POINTS = 2_500_000
"""Grid points a PRV computation may use (a few seconds); beyond, the error is widened."""

MAX_NOISE = 1e7
"""Noise beyond which no model is left, in standard deviations over sensitivity."""


@dataclass(frozen=True)
class Event:
    """``steps`` equal releases, each over a Poisson sample of the units."""

    mechanism: str
    """``gaussian`` or ``laplace``."""
    noise: float
    """Standard deviation over L2 sensitivity, or Laplace scale over L1 sensitivity; 0: no privacy."""
    rate: float = 1.0
    """Chance of each unit to be in a release; 1: all are in every one."""
    steps: int = 1

    def __post_init__(self) -> None:
        """Refuse what no accountant can price."""
        if self.mechanism not in ("gaussian", "laplace"):
            raise ConfigError(f"mechanism must be gaussian or laplace, got {self.mechanism!r}")
        check_noise(self.noise)
        check_rate(self.rate)
        check_steps(self.steps)


def epsilon(events: Iterable[Event], delta: float, accountant: str = "prv") -> float:
    """Epsilon of all ``events`` together; always a valid upper bound.

    Gaussian events without sampling have an exact closed form, which is used whatever the accountant.
    Sampled ones: ``prv`` is Opacus's numerical composition (Gopi et al. 2021), at most ``PRV_ERROR`` above
    the exact value; ``rdp`` is Opacus's Renyi accountant, looser, comparable with older papers. With
    ``prv`` the figure is the smallest of three bounds that all hold: PRV, RDP, and the closed form of the
    same events without sampling. So where PRV cannot be computed (tiny deltas, epsilons in the hundreds)
    the next best bound is returned, and never one that does not hold. Laplace events add their pure
    epsilon; with Laplace events alone ``delta`` may be 0. No events cost 0; an event without noise, inf.
    """
    merged = merge(events)
    check_accountant(accountant)
    check_delta(delta, zero=all(e.mechanism == "laplace" for e in merged))
    pure = sum(
        e.steps * laplace_epsilon(e.noise, e.rate) for e in merged if e.mechanism == "laplace"
    )
    gaussian = tuple(e for e in merged if e.mechanism == "gaussian")
    return pure + (_gaussian(gaussian, float(delta), accountant) if gaussian else 0.0)


@lru_cache(maxsize=512)
def calibrate(
    target_epsilon: float, delta: float, rate: float, steps: int, accountant: str = "prv"
) -> float:
    """Smallest Gaussian noise with which ``steps`` releases cost at most ``target_epsilon``.

    ``steps`` is the whole run, never one round. The epsilon of the result lies in (target - 0.02, target].
    Raises ConfigError, naming the smallest epsilon that can be reached, for a target below it.
    """
    check_epsilon(target_epsilon)
    check_delta(delta)
    check_rate(rate)
    check_steps(steps)
    check_accountant(accountant)
    full = gaussian_noise(target_epsilon, delta) * math.sqrt(steps)

    def cost(noise: float) -> float:
        return epsilon([Event("gaussian", noise, rate, steps)], delta, accountant)

    if rate == 1 and full <= MAX_NOISE:
        return full
    if (least := cost(MAX_NOISE)) > target_epsilon:
        raise ConfigError(
            f"epsilon {target_epsilon:g} at delta {delta:g} cannot be reached over {steps} steps at rate "
            f"{rate:g}: {least:.4g} is the smallest ({accountant} accountant); ask for more, or train less"
        )
    start = min(full, MAX_NOISE)
    if accountant == "prv":  # RDP is quick and a little above
        with suppress(ConfigError):
            start = calibrate(target_epsilon, delta, rate, steps, "rdp")
    return _smallest(cost, target_epsilon, start)


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal events as one with all their steps, in a fixed order: composition does not look at order."""
    steps: dict[tuple[str, float, float], int] = {}
    for e in events:
        key = (e.mechanism, float(e.noise), float(e.rate))
        steps[key] = steps.get(key, 0) + int(e.steps)
    return tuple(Event(*key, steps[key]) for key in sorted(steps))


def check_noise(noise: float, name: str = "noise_multiplier") -> None:
    """Standard deviation over sensitivity: finite and not negative."""
    if not _number(noise) or not 0 <= noise < math.inf:
        raise ConfigError(f"{name} must be a finite number >= 0, got {noise!r}")


def check_rate(rate: float, name: str = "sample_rate") -> None:
    """A Poisson sampling rate."""
    if not _number(rate) or not 0 < rate <= 1:
        raise ConfigError(f"{name} must be in (0, 1], got {rate!r}")


def check_steps(steps: object, name: str = "steps") -> None:
    """A number of releases."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"{name} must be a positive whole number, got {steps!r}")


def check_delta(delta: float, zero: bool = False) -> None:
    """A chance of failure; 0 only where every mechanism is pure."""
    if not _number(delta) or not (0 < delta < 1 or (zero and delta == 0)):
        raise ConfigError(
            f"delta must be in (0, 1), got {delta!r}; usual is well below 1 / number of units, e.g. 1e-5"
        )


def check_epsilon(target: float, name: str = "target_epsilon") -> None:
    """A privacy budget."""
    if not _number(target) or not 0 < target < math.inf:
        raise ConfigError(f"{name} must be a finite number > 0, got {target!r}")


def check_accountant(accountant: str) -> None:
    """One that gives an upper bound."""
    if accountant == "gdp":
        raise ConfigError(
            "accountant 'gdp' is an approximation that can report less epsilon than was spent; "
            "use prv or rdp"
        )
    if accountant not in ACCOUNTANTS:
        raise ConfigError(
            f"unknown accountant {accountant!r}; there are {' and '.join(ACCOUNTANTS)}"
        )


def _number(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


@lru_cache(maxsize=4096)
def _gaussian(events: tuple[Event, ...], delta: float, accountant: str) -> float:
    if any(e.noise == 0 for e in events):
        return math.inf
    unsampled = sum(e.steps / e.noise / e.noise for e in events)
    closed = gaussian_epsilon(1 / math.sqrt(unsampled), delta)
    if all(e.rate == 1 for e in events):
        return closed
    if accountant == "rdp":
        return _rdp(events, delta)
    # leaving units out at random never adds to what a release tells, so closed holds with sampling too
    if closed < 0.01:  # the others are slow there, and nobody needs it tighter
        return closed
    bounds = [closed, _rdp(events, delta)]
    least = max(_single_step(e, delta) for e in events)
    prv = _prv(events, delta, min(bounds))
    # more than one of the steps alone, which is known exactly: otherwise its numbers broke down
    return min([*bounds, prv] if prv >= least else bounds)


def _rdp(events: tuple[Event, ...], delta: float) -> float:
    """Opacus's RDP bound, with larger orders than its default, which small epsilons need."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    orders = _orders()
    try:
        total = sum(_renyi(e.noise, e.rate) * e.steps for e in events)
        with _quiet():
            found = float(get_privacy_spent(orders=orders, rdp=total, delta=delta)[0])
    except (ArithmeticError, ValueError):
        return math.inf
    return math.inf if math.isnan(found) else max(0.0, found)


@lru_cache(maxsize=4096)
def _renyi(noise: float, rate: float) -> Any:
    from opacus.accountants.analysis.rdp import compute_rdp

    with _quiet():
        return compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=_orders())


@lru_cache(maxsize=1)
def _orders() -> list[float]:
    from opacus.accountants import RDPAccountant

    more = [72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024]
    return [*RDPAccountant.DEFAULT_ALPHAS, *more]


def _prv(events: tuple[Event, ...], delta: float, bound: float) -> float:
    """Opacus's PRV bound; inf where it cannot be computed or would take too long.

    ``bound`` is an upper bound known already; the error that is allowed goes with it.
    """
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    accountant = PRVAccountant()
    accountant.history = [(e.noise, e.rate, e.steps) for e in events]
    prvs = [PoissonSubsampledGaussianPRV(e.rate, e.noise) for e in events]
    error, steps = max(min(PRV_ERROR, bound / 20), bound / 2000), [e.steps for e in events]
    try:
        with _quiet():
            while True:
                domain = accountant._get_domain(prvs, steps, error, delta / 1000)
                over = domain.size * len(events) / PRV_POINTS
                if over <= 1:
                    return _finite(accountant.get_epsilon(delta, eps_error=error))
                error *= 1.1 * over
                if error > min(1.0, bound / 20):
                    return math.inf
    except (ArithmeticError, ValueError, RuntimeError, MemoryError):
        return math.inf


def _finite(x: float) -> float:
    return max(0.0, float(x)) if math.isfinite(x) else math.inf


def _single_step(event: Event, delta: float) -> float:
    """Exact epsilon of one step of a sampled Gaussian when a unit is removed (0 beyond 700)."""
    low, high = 0.0, 1.0
    if sampled_delta(event.noise, 0.0, event.rate) <= delta:
        return 0.0
    while sampled_delta(event.noise, high, event.rate) > delta:
        high *= 2
        if high > 700:
            return 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        over = sampled_delta(event.noise, middle, event.rate) > delta
        low, high = (middle, high) if over else (low, middle)
    return low


def _smallest(cost: Callable[[float], float], target: float, start: float) -> float:
    """Smallest noise that costs at most ``target``; ``cost`` falls with noise.

    The next guess continues a straight line of log cost over log noise; every third halves the bracket, so
    that it always ends. What is returned was itself found to cost at most ``target``.
    """
    window = min(0.005, target / 200)
    goal = target - window / 2
    low, at_low = 0.0, math.inf
    high, at_high = start, cost(start)
    while at_high > target:
        low, at_low = high, at_high
        high = min(2 * high, MAX_NOISE)
        at_high = cost(high)
    for step in range(80):
        if at_high >= target - window or high - low < 1e-9 * high:
            break
        if math.isinf(at_low):  # no second point yet: cost falls at least like 1 / noise
            guess = max(high * max(at_high, 1e-9) / goal, high / 8)
        elif step % 3 == 2 or at_high <= 0:
            guess = math.sqrt(low * high)
        else:
            share = math.log(at_low / goal) / math.log(at_low / at_high)
            guess = low * (high / low) ** min(max(share, 0.02), 0.98)
        value = cost(guess)
        if value > target:
            low, at_low = guess, value
        else:
            high, at_high = guess, value
    return high


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Opacus's advice on orders and NumPy's on values that are checked afterwards."""
    import numpy

    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.filterwarnings(
            "ignore", r"Optimal order is the (largest|smallest) alpha", UserWarning
        )
        warnings.filterwarnings("ignore", r"The (maximum number|occurrence|integral)", UserWarning)
        yield
