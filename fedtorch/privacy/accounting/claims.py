"""What a claim means beyond (epsilon, delta): trade-off curve, several units, what a test can find.

A test of whether a unit was in the data errs in two ways. The trade-off curve says, for each chance of a
false alarm, how likely it is at least to miss the unit (Dong, Roth and Su 2022, arXiv:1905.02383). Every
pair (epsilon, delta) that holds bounds it by two straight lines; without sampling it is known exactly.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedtorch.privacy.accounting import bounds
from fedtorch.privacy.accounting.events import Event, Units, by_mechanism, epsilon, gaussian, merge
from fedtorch.privacy.accounting.gaussian import laplace_epsilon, quantile, tail
from fedtorch.privacy.accounting.mixed import REPLACED as REPLACED
from fedtorch.privacy.accounting.mixed import both_ways, moved
from fedtorch.privacy.accounting.search import Trials, search_epsilon
from fedtorch.privacy.accounting.skellam import skellam_epsilon

PAIRS = 96
"""Pairs (epsilon, delta) behind a curve."""

ALARMS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Chances of a false alarm that a curve is told at."""


@dataclass(frozen=True)
class Curve:
    """A bound on what any test can find out about one unit."""

    pairs: tuple[tuple[float, float], ...]
    """(epsilon, delta), which all hold."""
    mu: float | None = None
    """Of a Gaussian curve, which bounds the true one from below: telling N(0, 1) from N(mu, 1)."""
    exact: bool = False
    """Whether the curve is that Gaussian one."""

    def missed(self, alarms: float) -> float:
        """Chance that a test with so many false alarms misses a unit, at least."""
        found = 0.0
        if self.pairs:
            e, d = np.array(self.pairs).T
            with np.errstate(over="ignore"):
                lines = np.maximum(1 - d - np.exp(e) * alarms, np.exp(-e) * (1 - d - alarms))
            found = max(found, float(lines.max()))
        if self.mu is not None and 0 < alarms < 1 and math.isfinite(self.mu):
            found = max(found, tail(self.mu - quantile(1 - alarms)))
        return min(found, 1 - alarms)

    def found(self, alarms: float) -> float:
        """Chance that such a test finds a unit that is there (true positive rate), at most."""
        return 1 - self.missed(alarms)

    @property
    def advantage(self) -> float:
        """True over false positive rate of the best test, at most: (e^eps - 1 + 2 delta) / (e^eps + 1)."""
        most = [math.tanh(e / 2) + 2 * d / (1 + math.exp(min(e, 700.0))) for e, d in self.pairs]
        if self.mu is not None:
            most.append(1 - 2 * tail(self.mu / 2))
        return min(1.0, *most) if most else 1.0

    @property
    def points(self) -> list[tuple[float, float]]:
        """(false positive rate, false negative rate at least)."""
        return [(a, self.missed(a)) for a in ALARMS]


def curve(
    events: Iterable[Event], delta: float, accountant: str = "prv", trials: Trials | None = None
) -> Curve:
    """The trade-off curve of all ``events`` together, finest about ``delta``.

    ``trials``: of a search, whose every run has these events.
    """
    merged = merge(events)
    deltas = np.geomspace(1e-12, 0.5, PAIRS).tolist()
    if trials is not None:
        return Curve(tuple((search_epsilon(merged, trials, d), d) for d in (*deltas, delta)))
    if any(e.noise == 0 for e in merged):
        return Curve((), math.inf, exact=True)
    pure, run, shared = by_mechanism(merged)
    if not run and not shared:
        return Curve(((pure, 0.0),), None if pure else 0.0, exact=not pure)
    own = epsilon(merged, delta, accountant)
    if shared:
        return Curve(tuple((epsilon(merged, d, accountant), d) for d in (*deltas, delta)))
    if not math.isfinite(own):
        return Curve(())
    steps = np.linspace(0.0, min(1.25 * (own - pure) + 1, 600.0), PAIRS).tolist()
    known = zip(steps, bounds.deltas(run, delta, steps, accountant), strict=True)
    pairs = (*((pure + e, d) for e, d in known), (own, delta))
    if pure:
        return Curve(pairs)
    return Curve(pairs, bounds.shift(run), exact=all(rate == 1 for _, rate, *_ in run))


def epsilon_of(parts: Units, delta: float, accountant: str = "prv") -> float:
    """Epsilon where each of these releases shows several units, or another in place of one.

    Units that come and units that go are priced apart, and the dearer counts. Laplace and Skellam
    releases are those of one unit that moves them so many times as far.
    """
    if any(e.noise == 0 for e, _ in parts):
        return math.inf
    pure = sum(
        e.steps * laplace_epsilon(e.noise, e.rate) * moved(u)
        for e, u in parts
        if e.mechanism == "laplace"
    )
    shared = tuple(
        (e.noise, (e.l2 or 0.0) * moved(u), (e.l1 or 0.0) * moved(u), e.steps)
        for e, u in parts
        if e.mechanism == "skellam"
    )
    there = [(e, u) for e, u in parts if e.mechanism == "gaussian"]
    if shared:
        run = tuple((e.noise / moved(u), 1.0, e.steps) for e, u in there)
        return pure + skellam_epsilon(shared, run, delta)
    if not there:
        return pure
    return pure + max(
        gaussian(_merged(there, way), delta, accountant) for way in both_ways([u for _, u in there])
    )


def _merged(parts: Units, way: Sequence[int]) -> bounds.Run:
    """Equal releases as one with all their steps."""
    steps: dict[tuple[float, float, int], int] = {}
    for (e, _), u in zip(parts, way, strict=True):
        # one unit that comes costs no more than one that goes, which has a closed form
        kind = (e.noise, e.rate, 1 if u == -1 else u)
        steps[kind] = steps.get(kind, 0) + e.steps
    return tuple((noise, rate, t, u) for (noise, rate, u), t in sorted(steps.items()))
