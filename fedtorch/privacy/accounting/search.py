"""What a random search over settings costs whose best run alone is released.

Papernot and Steinke 2022 (arXiv:2110.03620): draw how many runs there will be, then so many settings from
a list, each with replacement; train each privately; release the best model and its setting, neither the
number of runs nor anything of the others. The score must be public, or a function of what a run releases.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fedtorch.privacy.accounting.events import Event, by_mechanism, check_delta, merge
from fedtorch.privacy.accounting.gaussian import bisected
from fedtorch.privacy.accounting.renyi import orders, renyi, renyi_deltas, renyi_epsilon
from fedtorch.types import ConfigError


@dataclass(frozen=True)
class Trials:
    """How many runs a search has: at random, ``mean`` of them.

    A truncated negative binomial number with ``eta`` > -1: 1 is geometric, 0 logarithmic.
    """

    mean: float
    eta: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no search."""
        if not 1 < self.mean < math.inf:
            raise ConfigError(f"a search must expect more than 1 run, got {self.mean:g}")

    @property
    def gamma(self) -> float:
        """The chance that belongs to this mean."""
        if self.eta == 1:
            return 1 / self.mean
        return math.exp(-bisected(lambda x: self._mean(x) < self.mean, 1e-9, 700.0))

    def _mean(self, x: float) -> float:
        """Expected runs at gamma = e^-x."""
        odds = -math.expm1(-x) / math.exp(-x)
        return odds / x if self.eta == 0 else self.eta * odds / -math.expm1(-self.eta * x)

    def divergence(self, one: Any) -> Any:
        """Renyi divergence of the search at each order, from that of one run: the paper's theorem 2.

        It holds with any h >= 1 beside each order; h = 1 has no divergence of its own.
        """
        h, x = orders(), -math.log(self.gamma)
        beside = np.minimum(((1 - 1 / h) * one + x / h).min(), x)
        return one + (1 + self.eta) * beside + math.log(self.mean) / (h - 1)


@dataclass(frozen=True)
class PoissonTrials(Trials):
    """A Poisson number of runs; of none, the untrained model is released: theorem 6."""

    def divergence(self, one: Any) -> Any:
        """The same for it, from the delta of one run at an epsilon that belongs to each order."""
        a = orders()
        deltas = np.array(renyi_deltas(one, np.log1p(1 / (a - 1)).tolist()))
        return one + self.mean * deltas + math.log(self.mean) / (a - 1)


def search_epsilon(events: Iterable[Event], trials: Trials, delta: float) -> float:
    """Epsilon of a search whose every run has these events, or fewer."""
    merged = merge(events)
    check_delta(delta)
    if any(e.mechanism != "gaussian" for e in merged):
        raise ConfigError(
            "a search is priced by the Renyi divergence of Gaussian noise, and this plan has another: "
            "leave out --sweep.random, and every run is charged, or choose sample or client"
        )
    if any(e.noise == 0 for e in merged):
        return math.inf
    _, run, _ = by_mechanism(merged)
    if not run:
        return 0.0
    one = sum(renyi(s, q) * t for s, q, t, *_ in run)
    return renyi_epsilon(trials.divergence(one), delta)


@lru_cache(maxsize=64)
def search_noise(
    target: float,
    delta: float,
    rate: float,
    steps: int,
    trials: Trials,
    beside: tuple[Event, ...] = (),
) -> float:
    """Smallest Gaussian noise with which the whole search costs at most ``target``.

    Raises ConfigError where no noise does.
    """

    def cost(noise: float) -> float:
        return search_epsilon([Event("gaussian", noise, rate, steps), *beside], trials, delta)

    high = 1.0
    while cost(high) > target:
        high *= 2
        if high > 1e7:
            raise ConfigError(
                f"epsilon {target:g} at delta {delta:g} cannot be reached by a search of {trials.mean:g} "
                f"runs: {cost(high):.4g} is the smallest; ask for more, or search less"
            )
    return bisected(lambda noise: cost(noise) > target, high / 2 if high > 1 else 1e-2, high, 1e-7)
