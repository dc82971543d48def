"""The joint price of a list of noised releases: (epsilon, delta) of a whole run.

Neighbouring relation: one unit (an example, or a client) is added or removed.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING

from fedtorch.types import ConfigError

if TYPE_CHECKING:
    from fedtorch.privacy.accounting.bounds import Run
    from fedtorch.privacy.accounting.skellam import Shared

# accountants are imported by who asks for a price: most runs are not private

ACCOUNTANTS = ("prv", "rdp")

MAX_NOISE = 1e7
"""Noise beyond which no model is left, in standard deviations over sensitivity."""


MECHANISMS = ("gaussian", "laplace", "skellam")

Kind = tuple[str, float, float] | tuple[str, float, float, float, float]
"""What a release is, without how often: mechanism, noise, rate and, of skellam, ``l2`` and ``l1``."""


@dataclass(frozen=True)
class Event:
    """``steps`` equal releases, each over a Poisson sample of the units."""

    mechanism: str
    """``gaussian``, ``laplace`` or ``skellam``."""
    noise: float
    """Standard deviation over L2 sensitivity, or Laplace scale over L1 sensitivity; of Skellam noise, which
    is made of whole numbers, its variance. 0: no privacy."""
    rate: float = 1.0
    """Chance of each unit to be in a release; 1: all are in every one."""
    steps: int = 1
    l2: float | None = None
    """Of skellam: how far one unit moves the whole numbers, in L2 norm."""
    l1: float | None = None
    """Of skellam: the same in L1 norm."""

    def __post_init__(self) -> None:
        """Refuse what no accountant can price."""
        if self.mechanism not in MECHANISMS:
            raise ConfigError(
                f"mechanism must be gaussian, laplace or skellam, got {self.mechanism!r}"
            )
        check_noise(self.noise)
        check_rate(self.rate)
        check_steps(self.steps)
        if self.mechanism != "skellam":
            if not self.l2 is self.l1 is None:
                raise ConfigError(f"l2 and l1 are of skellam events, not of {self.mechanism}")
            return
        if self.rate != 1:
            raise ConfigError(
                f"a skellam event has no amplification by sampling: rate must be 1, got {self.rate!r}"
            )
        if not all(_is_number(v) and 0 < float(v or 0) < math.inf for v in (self.l2, self.l1)):
            raise ConfigError(
                f"l2 and l1 of a skellam event must be finite numbers > 0, got {self.l2!r} and {self.l1!r}"
            )

    @property
    def kind(self) -> Kind:
        """What each of the releases is."""
        known = (self.mechanism, float(self.noise), float(self.rate))
        return (
            known
            if self.l2 is None or self.l1 is None
            else (*known, float(self.l2), float(self.l1))
        )

    @classmethod
    def of(cls, kind: Kind, steps: int) -> "Event":
        """So many releases of a kind."""
        return cls(kind[0], kind[1], kind[2], steps, *kind[3:])

    def body(self) -> dict[str, float | str]:
        """As a ledger has it: what the mechanism has not is left out."""
        found = vars(self)
        return {k: found[k] for k in found if found[k] is not None}


Units = Sequence[tuple[Event, int]]
"""Releases, and how many units each of them shows, or that one is in another's place (``mixed``)."""


def epsilon(events: Iterable[Event], delta: float, accountant: str = "prv") -> float:
    """Epsilon of all ``events`` together; always a valid upper bound.

    Gaussian events without sampling have an exact closed form, which is used whatever the accountant.
    Sampled ones: ``prv`` is numerical composition (Gopi et al. 2021), about 0.01 above the exact value
    up to epsilon 20 (more over millions of steps, a twentieth of epsilon at most); ``rdp`` is the Renyi
    accountant, looser, comparable with older papers.
    With ``prv`` the figure is the smallest of three bounds that all hold: PRV, RDP, and the closed form of
    the same events without sampling. So where PRV cannot be computed (epsilons in the
    hundreds) the next best bound is returned, and never one that does not hold. Laplace events add their
    pure epsilon; with Laplace events alone ``delta`` may be 0. Skellam events, and Gaussian ones beside
    them, are added up by Renyi divergence, whatever the accountant: PRV does not know them. No events cost
    0; one without noise, inf.
    """
    merged = merge(events)
    check_accountant(accountant)
    check_delta(delta, zero=all(e.mechanism == "laplace" for e in merged))
    pure, run, shared = by_mechanism(merged)
    if shared:
        from fedtorch.privacy.accounting.skellam import skellam_epsilon

        return pure + skellam_epsilon(shared, run, float(delta))
    return pure + (gaussian(run, float(delta), accountant) if run else 0.0)


def by_mechanism(merged: Iterable[Event]) -> tuple[float, "Run", "Shared"]:
    """The sum of pure epsilons, Gaussian releases, and Skellam ones."""
    from fedtorch.privacy.accounting.gaussian import laplace_epsilon

    there = tuple(merged)
    pure = sum(
        e.steps * laplace_epsilon(e.noise, e.rate) for e in there if e.mechanism == "laplace"
    )
    run = tuple((e.noise, e.rate, e.steps) for e in there if e.mechanism == "gaussian")
    shared = tuple(
        (e.noise, e.l2 or 0.0, e.l1 or 0.0, e.steps) for e in there if e.mechanism == "skellam"
    )
    return pure, run, shared


@lru_cache(maxsize=512)
def calibrate(
    target_epsilon: float,
    delta: float,
    rate: float,
    steps: int,
    accountant: str = "prv",
    beside: tuple[Event, ...] = (),
) -> float:
    """Smallest Gaussian noise with which ``steps`` releases cost at most ``target_epsilon``.

    ``beside``: what is released besides, and paid from the same target. ``steps`` is the whole run, never
    one round. The epsilon of the result lies in (target - 0.02, target].
    Raises ConfigError, naming the smallest epsilon that can be reached, for a target below it.
    """
    from fedtorch.privacy.accounting.gaussian import gaussian_noise

    check_epsilon(target_epsilon)
    check_delta(delta)
    check_rate(rate)
    check_steps(steps)
    check_accountant(accountant)
    full = gaussian_noise(target_epsilon, delta) * math.sqrt(steps)

    def cost(noise: float) -> float:
        return epsilon([Event("gaussian", noise, rate, steps), *beside], delta, accountant)

    if rate == 1 and full <= MAX_NOISE and not beside:
        return full * (1 + 1e-12)  # so that rounding cannot put its epsilon above the target
    if (least := cost(MAX_NOISE)) > target_epsilon:
        more = " beside what is released before them" if beside else ""
        raise ConfigError(
            f"epsilon {target_epsilon:g} at delta {delta:g} cannot be reached over {steps} steps at rate "
            f"{rate:g}{more}: {least:.4g} is the smallest ({accountant} accountant); ask for more, or "
            "train less"
        )
    start = min(full, MAX_NOISE)
    if accountant == "prv":  # RDP is quick and a little above
        with suppress(ConfigError):
            start = calibrate(target_epsilon, delta, rate, steps, "rdp", beside)
    return _smallest(cost, target_epsilon, start)


def over_rounds(
    noises: Iterable[float],
    rounds: Sequence[int],
    steps_per_round: int,
    rate: float,
    delta: float,
    accountant: str = "prv",
    figures: tuple[int, float] | None = None,
) -> dict[float, list[float]]:
    """Epsilon after each of ``rounds``, for each Gaussian noise.

    ``figures``: in every how many rounds some are released beside the model, and their noise multiplier.
    """
    check_steps(steps_per_round)
    for r in rounds:
        check_steps(r, "rounds")
    if figures:
        check_steps(figures[0], "rounds from figures to figures")

    def cost(noise: float, r: int) -> float:
        run = [Event("gaussian", noise, rate, r * steps_per_round)]
        if figures and r >= figures[0]:
            run.append(Event("gaussian", figures[1], 1.0, r // figures[0]))
        return epsilon(run, delta, accountant)

    return {noise: [cost(noise, r) for r in rounds] for noise in noises}


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal events as one with all their steps, in a fixed order: composition does not look at order."""
    steps: dict[Kind, int] = {}
    for e in events:
        steps[e.kind] = steps.get(e.kind, 0) + int(e.steps)
    return tuple(Event.of(kind, steps[kind]) for kind in sorted(steps))


def check_noise(noise: float, name: str = "noise_multiplier") -> None:
    """Standard deviation over sensitivity: finite and not negative."""
    if not _is_number(noise) or not 0 <= noise < math.inf:
        raise ConfigError(f"{name} must be a finite number >= 0, got {noise!r}")


def check_rate(rate: float, name: str = "sample_rate") -> None:
    """A Poisson sampling rate."""
    if not _is_number(rate) or not 0 < rate <= 1:
        raise ConfigError(f"{name} must be in (0, 1], got {rate!r}")


def check_steps(steps: object, name: str = "steps") -> None:
    """A number of releases."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"{name} must be a positive whole number, got {steps!r}")


def check_delta(delta: float, zero: bool = False) -> None:
    """A chance of failure; 0 only where every mechanism is pure."""
    if not _is_number(delta) or not (0 < delta < 1 or (zero and delta == 0)):
        raise ConfigError(
            f"delta must be in (0, 1), got {delta!r}; usual is well below 1 / number of units, e.g. 1e-5"
        )


def check_epsilon(target: float, name: str = "target_epsilon") -> None:
    """A privacy budget."""
    if not _is_number(target) or not 0 < target < math.inf:
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


def _is_number(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


@lru_cache(maxsize=4096)
def gaussian(run: "Run", delta: float, accountant: str) -> float:
    """Epsilon of Gaussian releases: the smallest bound that there is."""
    from fedtorch.privacy.accounting import bounds

    if any(noise == 0 for noise, *_ in run):
        return math.inf
    if all(rate == 1 for _, rate, *_ in run):
        return bounds.unsampled(run, delta)
    if accountant == "rdp":
        return bounds.rdp(run, delta)
    # three rising bounds cut off at the same height: their smallest rises with every step too, but for what
    # grids differ in and where PRV has no answer for some number of steps and one for more
    sampled = min(bounds.rdp(run, delta), bounds.prv(run, delta))
    return bounds.capped(run, delta, max(sampled, bounds.LEAST))


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
        if at_high >= target - window or high - low < 1e-5 * high:
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
