"""How the columns of a table are scaled, and what stands for numbers that are missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtorch.data import columns
from fedtorch.data.columns import Categories
from fedtorch.data.options import TableOptions
from fedtorch.types import ConfigError


@dataclass(frozen=True)
class Scaling:
    """Center and width of each column, and what fills it; 0, 1 and nothing where it is left alone."""

    center: np.ndarray
    width: np.ndarray
    fill: list[float | None]
    derived: tuple[str, ...] = ()
    """What was taken from the rows themselves, each with what to give in its place under privacy."""


def by_hand(
    names: Sequence[str], bounds: Mapping[str, tuple[float, float]], known: Categories
) -> Scaling:
    """By public bounds: low is -1, high is 1."""
    if wrong := [n for n in bounds if n not in names or n in known]:
        raise ConfigError(
            f"dataset.bounds names {wrong[0]!r}, which is no column of numbers to learn from; there are "
            f"{', '.join(n for n in names if n not in known)}"
        )
    ends = [bounds.get(n, (-1.0, 1.0)) for n in names]
    center = np.array([(low + high) / 2 for low, high in ends])
    width = np.array([(high - low) / 2 for low, high in ends])
    return Scaling(center, width, [None] * len(names))


def by_rows(rows: np.ndarray, known: Sequence[bool]) -> Scaling:
    """By mean and standard deviation of these rows, [N, columns]; categories (``known``) are left alone."""
    there = ~np.isnan(rows)
    count = np.maximum(there.sum(0), 1)
    center = np.where(there, rows, 0.0).sum(0) / count
    square = (np.where(there, rows - center, 0.0) ** 2).sum(0) / np.maximum(count - 1, 1)
    width = np.sqrt(np.where(square > 0, square, 1.0))
    center, width = np.where(known, 0.0, center), np.where(known, 1.0, width)
    return Scaling(center, width, [None] * rows.shape[1])


def _middle(column: np.ndarray, how: str) -> float:
    """Mean or median of what is there; 0 where nothing is."""
    there = column[~np.isnan(column)]
    if not len(there):
        return 0.0
    return float(np.median(there) if how == "median" else np.mean(there))


def scaled_and_filled(
    given: TableOptions,
    names: list[str],
    known: Categories,
    found: Sequence[str],
    rows: np.ndarray,
) -> tuple[Scaling, str]:
    """How columns are scaled and filled, and the first of it in words (none: they are left as they are)."""
    bounds, derived = columns.ranges(given.bounds), []
    if given.standardize is True:
        scaling = by_rows(rows, [n in known for n in names])
        words = "scaled to mean 0 and deviation 1"
        derived = ["dataset.standardize true (give bounds, and private)"]
    else:
        scaling = by_hand(names, bounds, known)
        words = f"with {', '.join(bounds)} scaled by public bounds" if bounds else ""
    if given.standardize == "private":
        by = "median and quartiles" if given.statistics == "quartiles" else "mean and deviation"
        words = f"with {', '.join(bounds)} scaled by private {by}"
    if found:
        public = ",".join(f"{n}={'|'.join(known[n])}" for n in found)
        derived.append(
            f"the categories of {', '.join(found)} (declare: --dataset.categories {public!r})"
        )
    fill, taken = _fill(given, names, known, rows, scaling)
    if taken:
        public = ",".join(f"{n}=NUMBER" for n in taken)
        derived.append(f"the {given.missing} of {', '.join(taken)} (give --dataset.fill {public})")
    return replace(scaling, fill=fill, derived=tuple(derived)), words


def _fill(
    given: TableOptions,
    names: list[str],
    known: Categories,
    rows: np.ndarray,
    scaling: Scaling,
) -> tuple[list[float | None], list[str]]:
    """What stands for missing numbers of each column (None: nothing), and where it comes from the rows."""
    declared = columns.fills(given.fill)
    if wrong := [n for n in declared if n not in names or n in known]:
        raise ConfigError(
            f"dataset.fill names {wrong[0]!r}, which is no column of numbers to learn from"
        )
    fill: list[float | None] = [declared.get(n) for n in names]
    taken = []
    asked = with_gaps(given, names, known) - declared.keys()
    for j in [j for j, n in enumerate(names) if n in asked]:
        if given.missing == "indicator" or given.standardize == "private":
            fill[j] = float(scaling.center[j])
        elif names[j] not in known:
            fill[j] = _middle(rows[:, j], given.missing)
            taken.append(names[j])
    return fill, taken


def with_gaps(given: TableOptions, names: Sequence[str], known: Categories) -> set[str]:
    """Columns in which a value may be missing: under private statistics those that have some."""
    declared = {*columns.fills(given.fill)}
    if given.missing in ("", "drop"):
        return declared
    if given.standardize == "private" and given.missing != "indicator":
        return {*columns.ranges(given.bounds), *known, *declared}
    return {*names}


def gaps_in_words(given: TableOptions) -> list[str]:
    """What stands for missing numbers, in words."""
    declared = [f"missing {f.replace('=', ' is ')}" for f in given.fill]
    if given.missing in ("", "drop"):
        return declared
    words = f"are the {given.missing}"
    if given.missing == "indicator":
        words = "are marked by inputs of their own"
    elif given.standardize == "private":
        words = f"of {', '.join(columns.ranges(given.bounds))} are the private center"
    return [f"missing numbers {words}", *declared]


def gap(numbers: np.ndarray, filled: Sequence[bool]) -> tuple[int, int] | None:
    """Row and column of the first number that is missing where nothing fills it; None: there is none."""
    places = np.argwhere((np.isnan(numbers) & ~np.array(filled)).T)
    return (int(places[0, 1]), int(places[0, 0])) if len(places) else None
