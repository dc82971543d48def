"""Centers and widths of columns, released once before round 0: what private data are scaled by.

A record adds one vector to a sum, whose norm is bounded by its form: values beyond public bounds count as
the bounds, and what is missing has a place of its own or none. ``Privacy.total`` adds up the vectors, under
client-level privacy one mean vector of each client, and noises the sum for an ``Event("gaussian",
statistics_noise)``. All that is read off the noised sum costs nothing more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedtorch.privacy.base import Privacy
from fedtorch.types import ConfigError

BINS = 16
"""Of a histogram: with more, quartiles are finer and noisier."""

NORMAL = 1.349
"""Distance of a normal distribution's quartiles, in standard deviations."""

WEAK = 0.25
"""Centers with a larger error are warned of."""

MOSTLY_NOISE = (
    "warning: the private statistics are mostly noise, as there are too few records for so many clients "
    "and columns: scale fewer columns, lower privacy.statistics_noise, or let dataset.bounds scale alone"
)

LEAST_VARIANCE = 1e-4
"""Least variance of a column whose bounds are -1 and 1."""


class Statistics(Protocol):
    """What a record adds, and what can be read off the sum."""

    @property
    def norm(self) -> float:
        """Largest norm of a record's vector."""

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """[n, columns], NaN where a value is missing -> what each record adds, [n, m]."""

    def read(self, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Center and width of each column from the sum, [m]."""

    def error(self, total: np.ndarray, std: float) -> float:
        """About how far noise of ``std`` moves a center, as a share of the records or of half the range."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles from a histogram of each column; for few records and rough bounds.

    A record is in one bin of each column: its norm is at most sqrt(columns).
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def norm(self) -> float:
        """One for each column."""
        return math.sqrt(len(self.low))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """One-hot, column after column; nothing where a value is missing."""
        share = (np.clip(rows, self.low, self.high) - self.low) / (self.high - self.low)
        bins = np.minimum(share * BINS, BINS - 1)[..., None]
        found = (bins >= np.arange(BINS)) & (bins < np.arange(BINS) + 1)
        return np.asarray(found.reshape(len(rows), BINS * len(self.low)), float)

    def read(self, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The median; the quartiles' distance as a normal distribution's deviation."""
        found = np.array([_quartiles(h) for h in total.reshape(-1, BINS)])
        first, median, third = self.low + (self.high - self.low) * found.T
        least = (self.high - self.low) / BINS / 4
        return median, np.maximum((third - first) / NORMAL, least)

    def error(self, total: np.ndarray, std: float) -> float:
        """The count below the median is a sum of half the bins."""
        records = total.sum() / len(self.low)
        return float(std * math.sqrt(BINS) / 2 / max(records, 1.0))


def _quartiles(counts: np.ndarray) -> np.ndarray:
    """Quartiles, in [0, 1], of a noised histogram over [0, 1]."""
    below = np.concatenate([[0.0], counts.cumsum()])
    if below[-1] <= 0:  # nothing but noise: as if all were equally likely
        return np.array([0.25, 0.5, 0.75])
    share = below / below[-1]
    # noise makes it fall in places: between the least that never falls above it and the most below it
    rising = np.maximum.accumulate(share) + np.minimum.accumulate(share[::-1])[::-1]
    rising = np.clip(rising / 2, 0.0, 1.0)
    rising[0], rising[-1] = 0.0, 1.0
    return np.interp([0.25, 0.5, 0.75], rising, np.linspace(0, 1, BINS + 1))


@dataclass(frozen=True)
class Sums:
    """Mean and deviation from noised sums; for tens of thousands of records.

    With u in [-1, 1] between the bounds a record adds 1 and, for each column, u, u^2 - 1/2 and 0, or 0, 0
    and 1 where the value is missing: its norm is at most sqrt(1 + 1.25 columns).
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def norm(self) -> float:
        """The count, and 1 + 1/4 for each column."""
        return math.sqrt(1 + 1.25 * len(self.low))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The count, then u, u^2 - 1/2 and whether it is missing, of all columns each."""
        gone = np.isnan(rows)
        half = (self.high - self.low) / 2
        u = (np.clip(np.where(gone, self.low, rows), self.low, self.high) - self.low) / half - 1
        u, square = np.where(gone, 0.0, u), np.where(gone, 0.0, u * u - 0.5)
        return np.concatenate([np.ones((len(rows), 1)), u, square, gone], 1)

    def read(self, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation."""
        first, square, gone = total[1:].reshape(3, -1)
        there = np.maximum(total[0] - gone, 1.0)
        mean = np.clip(first / there, -1, 1)
        variance = np.maximum(square / there + 0.5 - mean**2, LEAST_VARIANCE)
        half = (self.high - self.low) / 2
        return self.low + half * (mean + 1), half * np.sqrt(np.minimum(variance, 1.0))

    def error(self, total: np.ndarray, std: float) -> float:
        """Noise of a sum over the count."""
        return float(std / max(total[0], 1.0))


KINDS: dict[str, Callable[[np.ndarray, np.ndarray], Statistics]] = {
    "quartiles": Quartiles,
    "sums": Sums,
}


def released(
    plan: Privacy,
    kind: str,
    bounds: Sequence[tuple[float, float]],
    rows: Sequence[np.ndarray],
    ids: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, str]:
    """Center and width of each column from the ``rows``, [n, columns], of each client; a warning, if any.

    Guarantee: ``Event("gaussian", plan.statistics_noise)`` for the plan's unit, whatever the rows are. It
    is in ``plan.once``, which a run charges before anything of this leaves the memory of its process.
    """
    if plan.statistics_noise is None:
        raise ConfigError(
            "private statistics of columns need a plan that pays for them: privacy.statistics_noise 10"
        )
    asked, each = kind_of(kind, bounds), zip(rows, ids, strict=True)
    sent = [plan.portion(asked.vectors(own), id, asked.norm) for own, id in each]
    return read(plan, asked, sent)


def kind_of(kind: str, bounds: Sequence[tuple[float, float]]) -> Statistics:
    """Those of a kind, of columns with these public bounds."""
    low, high = np.array(bounds, dtype=float).T
    return KINDS[kind](low, high)


def read(
    plan: Privacy, asked: Statistics, sent: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, str]:
    """Centers and widths [columns], and a warning, if any, from what each has sent, ``Privacy.portion``."""
    total = plan.total(sent, asked.norm)
    std = (plan.statistics_noise or 0.0) * asked.norm
    std *= math.sqrt(len(sent)) if plan.per_client else 1
    weak = asked.error(total, std) > WEAK
    return *asked.read(total), MOSTLY_NOISE if weak else ""
