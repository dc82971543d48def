"""What each column of a table becomes: a number that may be scaled, or one input for each category.

``Preparation`` holds the steps column by column; ``encoded`` takes them, in training and to predict alike.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedtorch.data import misread
from fedtorch.data.base import Preparation
from fedtorch.data.sheet import LETTERS, TRUTH, Sheet
from fedtorch.types import ConfigError

FOUND = "found"
"""In place of categories: those that the rows hold."""

MOST_FOUND = 50
"""A column with more different names is no column of categories."""

MOST_APART = 1000.0
"""Columns whose sizes differ by more are named."""

Categories = Mapping[str, tuple[str, ...]]


def named(option: str, entries: Sequence[str], like: str) -> dict[str, str]:
    """``name=text`` entries of an option as a table."""
    found = {}
    for entry in entries:
        name, equals, rest = entry.partition("=")
        if not (name and equals and rest) or name in found:
            raise ConfigError(f"{option} must read {like}, each column once, not {entry!r}")
        found[name.strip()] = rest.strip()
    return found


def ranges(
    entries: Sequence[str], option: str = "dataset.bounds"
) -> dict[str, tuple[float, float]]:
    """Public bounds: ``age=20:90``."""
    found = {}
    for name, text in named(option, entries, "age=20:90,chol=100:400").items():
        low, high = (_number(t) for t in (text.split(":") if text.count(":") == 1 else ("", "")))
        if not low < high:
            raise ConfigError(f"{option} {name}={text} must be two numbers, low:high")
        found[name] = (low, high)
    return found


def fills(entries: Sequence[str]) -> dict[str, float]:
    """Public values for missing ones: ``chol=240``."""
    found = {k: _number(v) for k, v in named("dataset.fill", entries, "chol=240,age=54").items()}
    if wrong := [k for k, v in found.items() if not math.isfinite(v)]:
        raise ConfigError(f"dataset.fill {wrong[0]} must be a number")
    return found


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def key(table: Sheet, text: str) -> str:
    """A category as it is compared: 1 and 1.0 are the same."""
    number = table.number(text)
    return text if number is None else repr(number)


def categories(
    table: Sheet, names: Sequence[str], entries: Sequence[str]
) -> tuple[Categories, list[str], list[str]]:
    """Categories of each column that has them; those found in the rows by name; and what is to be said.

    Raises ConfigError where a column holds names and none are declared for it.
    """
    given = [e for e in entries if "=" in e]
    declared = {
        n: tuple(dict.fromkeys(c.strip() for c in text.split("|")))
        for n, text in named("dataset.categories", given, "ward=a|b|c,sex=F|M").items()
    }
    loose = [e.strip() for e in entries if "=" not in e]
    for name in (*declared, *(n for n in loose if n != FOUND)):
        if name not in names:
            raise ConfigError(
                f"{table.path}: dataset.categories names {name!r}, which is no feature; features are "
                f"{', '.join(names)}"
            )
    words = [n for n in names if n not in declared and n not in loose and _words(table, n)]
    if words and FOUND not in loose:
        raise _undeclared(table, words)
    found = [n for n in names if n in words or n in loose]
    every = declared | {n: _there(table, n) for n in found}
    notes = [f"{n} is {_some(every[n])} or other" for n in names if n in every]
    truth = [n for n in names if n not in every and _truth(table, n)]
    notes += [f"{', '.join(truth)}: true or yes is 1, false or no is 0"] if truth else []
    return every, found, notes


def _words(table: Sheet, name: str) -> bool:
    """Whether most of a column's values are names; raises ConfigError where they are dates."""
    if table.plain(name) is not None:
        return False
    values = [v for v in table.column(name) if not table.missing(v)]
    others = [v for v in values if table.number(v) is None]
    if not others or all(v.lower() in TRUTH for v in others):
        return False
    if any(map(misread.number, others)):
        return False  # a date, a time or a price is refused as the number it is not
    return 2 * len(others) > len(values)


def _truth(table: Sheet, name: str) -> bool:
    return table.plain(name) is None and any(v.lower() in TRUTH for v in table.column(name))


def _there(table: Sheet, name: str) -> tuple[str, ...]:
    values = [v for v in table.column(name) if not table.missing(v)]
    first = {key(table, v): v for v in reversed(values)}
    if not 0 < len(first) <= MOST_FOUND:
        raise ConfigError(
            f"{table.path}: column {name!r} holds {len(first)} different names such as "
            f"{values[0][:LETTERS]!r}, too many for categories: "
            f"leave it out with --dataset.drop {name}"
            if first
            else f"{table.path}: column {name!r} is empty: leave it out with --dataset.drop {name}"
        )
    return tuple(first[k] for k in sorted(first, key=lambda k: (table.number(k) or 0.0, k)))


def _undeclared(table: Sheet, words: Sequence[str]) -> ConfigError:
    every = [f"{n}={'|'.join(_there(table, n))}" for n in words]
    how = f"--dataset.categories {','.join(every)!r}"
    if any("," in e for e in every):  # which on the command line stands between columns
        how = f"categories = {every} under [dataset] in a --config file"
    column = table.column(words[0])
    first = next(v for v in column if table.number(v) is None and not table.missing(v))
    many = len(words) > 1
    return ConfigError(
        f"{table.path}: {'columns' if many else 'column'} {', '.join(map(repr, words))} "
        f"{'hold' if many else 'holds'} names such as {first[:LETTERS]!r}, not a number: declare the "
        f"categories with {how}, leave them out with --dataset.drop {','.join(words)}, or, without "
        f"privacy, take those that are there with --dataset.categories {FOUND}"
    )


def codes(table: Sheet, names: Sequence[str], known: Categories) -> np.ndarray:
    """Numbers of the columns, [N, columns] float64: of a category its place, NaN for what is missing.

    A category that is not known has the place after the last.
    """
    found = np.empty((len(table.rows), len(names)))
    for j, name in enumerate(names):
        if name in known:
            place = {key(table, c): float(k) for k, c in enumerate(known[name])}
            found[:, j] = [
                math.nan if table.missing(v) else place.get(key(table, v), len(place))
                for v in table.column(name)
            ]
        elif (plain := table.plain(name)) is not None:
            found[:, j] = plain
        elif _truth(table, name):
            found[:, j] = [_yes(table, v, i, name) for i, v in enumerate(table.column(name))]
        else:
            found[:, j] = table.numbers(name)
    return found


def fit(table: Sheet, names: Sequence[str], numbers: np.ndarray) -> None:
    """Raises ConfigError naming line and column of a number that is infinite, or would be as a float32."""
    large = np.argwhere(np.abs(numbers) > np.finfo(np.float32).max)
    for row, j in large.tolist()[:1]:
        raise ConfigError(
            f"{table.place(row)}: column {names[j]!r} holds {table.column(names[j])[row][:60]!r}, and "
            "numbers are at most 3.4e38 here: correct it, or leave the row out"
        )


def _yes(table: Sheet, text: str, row: int, name: str) -> float:
    value = TRUTH.get(text.lower(), table.number(text))
    if value is None and not table.missing(text):
        raise table.wrong(row, name, text)
    return math.nan if value is None else value


def encoded(numbers: np.ndarray, done: Preparation) -> Tensor:
    """Inputs [N, width] from codes [N, columns]: scaled numbers, marks of missing ones, one-hot categories.

    What is missing is NaN where nothing fills it.
    """
    parts = []
    for j in range(len(done.columns)):
        column, names = numbers[:, j], done.categories[j] if done.categories else ()
        gone = np.isnan(column)
        if names:
            place = np.where(gone, len(names), column)
            parts.append(place[:, None] == np.arange(len(names) + 1))
            continue
        fill = done.fill[j] if done.fill else None
        column = np.where(gone, np.nan if fill is None else fill, column)
        if done.mean:
            column = (column - done.mean[j]) / done.deviation[j]
        parts.append(column[:, None])
        if done.missing == "indicator":
            parts.append(gone[:, None])
    return torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))


def far_apart(rows: np.ndarray, done: Preparation) -> str:
    """A sentence where columns differ by more than a thousand in size after scaling; else nothing."""
    numeric = [j for j, c in enumerate(done.categories or [()] * len(done.columns)) if not c]
    if len(numeric) < 2:
        return ""
    center = np.array(done.mean or np.zeros(rows.shape[1]))
    width = np.array(done.deviation or np.ones(rows.shape[1]))
    square = np.nan_to_num((rows - center) / width) ** 2
    size = np.sqrt(square.sum(0) / np.maximum((~np.isnan(rows)).sum(0), 1))
    sizes = {done.columns[j]: float(size[j]) for j in numeric if size[j] > 0}
    if not sizes or max(sizes.values()) <= MOST_APART * min(sizes.values()):
        return ""
    least = min(sizes, key=sizes.__getitem__)
    large = [n for n, s in sizes.items() if s > MOST_APART * sizes[least]]
    return (
        f"warning: {_some(large)} {'are' if large[1:] else 'is'} over 1,000 times as large as {least!r}: "
        "scale by public bounds (--dataset.bounds "
        f"{','.join(f'{n}=LOW:HIGH' for n in large[:3])}), or --dataset.standardize"
    )


def _some(names: Sequence[str]) -> str:
    shown = [n[:LETTERS] for n in names[:8]]
    return ", ".join(shown) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
