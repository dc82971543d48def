"""From the text of a table to data: which columns, which rows, scaled how; and new rows in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtorch.data import columns, frames, sheet, units
from fedtorch.data.base import Asks, Data, Preparation
from fedtorch.data.columns import Scaling
from fedtorch.data.content import split
from fedtorch.data.options import TableOptions
from fedtorch.data.sheet import Format, Sheet
from fedtorch.data.targets import Targets, from_targets, understood
from fedtorch.types import ConfigError

OWNERS = {
    "client",
    "owner",
    "hospital",
    "center",
    "centre",
    "clinic",
    "site",
    "institution",
    "organisation",
}
"""Columns that are asked about: they name who holds a row, as their name or as ``..._id``."""

INDEX = "Unnamed: 0"
"""Pandas' name for an index without one."""

BY_FILE = "file"
"""Who holds a row, where several files were read and no column says it."""


@dataclass(frozen=True)
class Loaded:
    """A table that is read, and may wait for how it will be scaled."""

    name: str
    numbers: np.ndarray
    """Codes of the columns, [N, columns]."""
    y: Targets
    keys: Sequence[str] | None
    parts: tuple[Tensor, Tensor]
    done: Preparation

    def data(self, done: Preparation) -> Data:
        """The data by this preparation."""
        x = columns.encoded(self.numbers, done)
        return from_targets(self.name, x, self.y, self.keys, self.parts, done)

    def settled(self, kept: Preparation) -> Data:
        """The data scaled and filled as in an earlier preparation of the same columns."""
        if (kept.columns, kept.categories) != (self.done.columns, self.done.categories):
            raise ConfigError(
                "the run was trained on other columns: a resumed run needs the same data"
            )
        return self.data(
            replace(
                self.done,
                mean=kept.mean,
                deviation=kept.deviation,
                fill=kept.fill,
                notes=kept.notes,
            )
        )

    def answered(
        self,
        at: Sequence[int],
        filled: Sequence[int],
        center: Sequence[float],
        width: Sequence[float],
        note: str,
    ) -> Data:
        """The data with the columns ``at`` scaled by these numbers; of ``filled`` the center fills gaps."""
        done = self.done
        mean, deviation, fill = list(done.mean), list(done.deviation), list(done.fill)
        for j, c, w in zip(at, center, width, strict=True):
            mean[j], deviation[j] = float(c), float(w)
            fill[j] = float(c) if j in filled else fill[j]
        return self.data(
            replace(
                done,
                mean=tuple(mean),
                deviation=tuple(deviation),
                fill=tuple(fill),
                notes=(*done.notes, *([note] if note else [])),
            )
        )


def assembled(given: TableOptions, table: Sheet, test: Sheet | None, seed: int) -> Data:
    """From text to data."""
    target = given.target or table.header[-1]
    names, dropped, remarks = _columns(given, table, target)
    keys = _owners(given, table) if given.client else [Path(f).stem for f in table.files] or None
    used = [*names, target]
    n = len(table.rows)
    both = (
        table.only(used)
        if test is None
        else sheet.stacked(table.path, [table.only(used), test.only(used)])
    )
    known, found, notes = columns.categories(both, names, given.categories)
    numbers = columns.codes(both, names, known)
    if given.missing == "drop":
        gone = np.isnan(numbers).any(1) | [both.missing(v) for v in both.column(target)]
        kept = np.flatnonzero(~gone)
        if not len(kept):
            raise ConfigError(
                f"{table.path}: every row lacks a value: leave columns out, or fill them"
            )
        numbers, both, n = numbers[kept], both.kept(kept.tolist()), int((kept < n).sum())
        keys = [keys[i] for i in kept[:n]] if keys else None
        notes.append("rows that lack a value are left out")
    filled = _filled(given, names, known)
    _none_missing(both, names, numbers, [n in filled for n in names])
    y = understood(table.path, *_target(given, both, target))
    if test is None:
        first = torch.tensor(numbers, dtype=torch.float32)
        parts = split([first, y.y, *([keys] if keys else [])], given.test_fraction, seed)
    else:
        parts = torch.arange(n), torch.arange(n, len(numbers))
    scaling, words = _scaling(given, names, known, found, numbers[parts[0]])
    scaled = bool(words)
    done = Preparation(
        classes=y.classes,
        columns=tuple(names),
        categories=tuple(known.get(n, ()) for n in names) if known else (),
        missing=given.missing,
        fill=tuple(scaling.fill),
        header=tuple(given.columns),
        separator=given.separator,
        encoding=given.encoding,
        na=tuple(given.na),
        target=target,
        client=given.client or (BY_FILE if table.files else ""),
        dropped=tuple(dropped),
        decimal=given.decimal,
        mean=tuple(scaling.center.tolist()) if scaled else (),
        deviation=tuple(scaling.width.tolist()) if scaled else (),
        scaled=words,
        numbers=units.look(_plain(numbers, known, names)),
        notes=(*both.notes, *notes, *_gaps(given), *y.notes),
        found=tuple(found),
        derived=scaling.derived,
    )
    odd = columns.far_apart(numbers[parts[0]], done)
    done = replace(done, remarks=(*remarks, *([odd] if odd else [])))
    name = Path(table.path).stem if "*" not in table.path else Path(table.path).parent.name
    loaded = Loaded(name or "table", numbers, y, keys, parts, done)
    data = loaded.data(done)
    if given.standardize != "private":
        return data
    bounds = columns.ranges(given.bounds)
    at = [names.index(n) for n in bounds]
    rows = numbers[parts[0]][:, at]
    gaps = [j for j in at if names[j] in filled - columns.fills(given.fill).keys()]
    answer = partial(loaded.answered, at, gaps)
    asks = Asks(rows, tuple(bounds.values()), given.statistics, answer, loaded.settled)
    return replace(data, asks=asks)


def _columns(
    given: TableOptions, table: Sheet, target: str
) -> tuple[list[str], list[str], list[str]]:
    """Features, columns that are left out, and what looks odd about them."""
    header, remarks = table.header, []
    for role, names in (
        ("target", [target]),
        ("client", [given.client] if given.client else []),
        ("feature", given.features),
        ("dropped", given.drop),
    ):
        for column in names:
            if column not in header or not column:
                raise ConfigError(
                    f"{table.path} has no {role} column {column!r}; it has {', '.join(header)}"
                )
    index = [h for h in header[:1] if h in ("", INDEX) and h not in given.features]
    left = [h for h in header if h != target and not (given.client and h == given.client)]
    names = given.features or [h for h in left if h not in (*given.drop, *index)]
    if not names or target in names or (given.client and given.client in names):
        raise ConfigError(f"{table.path} has no feature columns beside {target!r}")
    for name in () if given.features else names:
        owner = name.lower().removesuffix("_id").removesuffix(" id") in OWNERS
        if (
            owner
            and not given.client
            and not any(e.startswith(f"{name}=") for e in given.categories)
        ):
            raise ConfigError(
                f"{table.path}: does column {name!r} say who holds a row? Then give --dataset.client "
                f"{name}; else leave it out with --dataset.drop {name}, or name every column to learn "
                "from with --dataset.features"
            )
        if _counts(table.column(name)):
            remarks.append(
                f"{name!r} counts the rows: if it is an index, give --dataset.drop {name}"
            )
    return list(names), [h for h in left if h not in names], remarks


def _owners(given: TableOptions, table: Sheet) -> list[str]:
    owners = table.column(given.client)
    if "" in owners:
        raise ConfigError(
            f"{table.place(owners.index(''))}: column {given.client!r} is empty: whose row is it?"
        )
    return owners


def _target(given: TableOptions, table: Sheet, target: str) -> tuple[np.ndarray, str, list[str]]:
    """Numbers, truth values, or names; the kind, and the names of the classes."""
    written, kind = table.column(target), given.kind
    numbers = [table.number(v) for v in written]
    gone = [i for i, v in enumerate(written) if table.missing(v)]
    if gone:
        raise table.wrong(gone[0], target, written[gone[0]])
    if given.positive:
        yes = {columns.key(table, v) for v in given.positive}
        answers = np.array([columns.key(table, v) in yes for v in written])
        if not answers.any():
            raise ConfigError(
                f"{table.path}: no row's {target!r} is {' or '.join(given.positive)} (dataset.positive)"
            )
        return np.where(answers, "yes", "no"), "binary" if kind == "auto" else kind, ["no", "yes"]
    if {v.lower() for v in written} <= {"true", "false"}:
        return np.array([v.lower() == "true" for v in written]), kind, given.classes
    names = [n for n, v in zip(numbers, written, strict=True) if n is None and v.isprintable()]
    if len(names) < len(written) or kind == "regression":
        return table.numbers(target), kind, given.classes
    return np.array(written), kind, given.classes


def _scaling(
    given: TableOptions,
    names: list[str],
    known: columns.Categories,
    found: Sequence[str],
    rows: np.ndarray,
) -> tuple[Scaling, str]:
    """How columns are scaled and filled, and the first of it in words (none: they are left as they are)."""
    bounds, derived = columns.ranges(given.bounds), []
    if given.standardize is True:
        scaling = columns.by_rows(rows, [n in known for n in names])
        words = "scaled to mean 0 and deviation 1"
        derived = ["dataset.standardize true (give bounds, and private)"]
    else:
        scaling = columns.by_hand(names, bounds, known)
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
    return Scaling(scaling.center, scaling.width, fill, tuple(derived)), words


def _fill(
    given: TableOptions,
    names: list[str],
    known: columns.Categories,
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
    for j in [
        j for j, n in enumerate(names) if n in _filled(given, names, known) - declared.keys()
    ]:
        if given.missing == "indicator" or given.standardize == "private":
            fill[j] = float(scaling.center[j])
        elif names[j] not in known:
            fill[j] = columns.middle(rows[:, j], given.missing)
            taken.append(names[j])
    return fill, taken


def _filled(given: TableOptions, names: Sequence[str], known: columns.Categories) -> set[str]:
    """Columns in which a value may be missing: under private statistics those that have some."""
    declared = {*columns.fills(given.fill)}
    if given.missing in ("", "drop"):
        return declared
    if given.standardize == "private" and given.missing != "indicator":
        return {*columns.ranges(given.bounds), *known, *declared}
    return {*names}


def _gaps(given: TableOptions) -> list[str]:
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


def _none_missing(
    table: Sheet, names: Sequence[str], numbers: np.ndarray, filled: Sequence[bool]
) -> None:
    """Raises ConfigError where a value is missing that nothing fills."""
    for j, name in enumerate(names):
        rows = np.flatnonzero(np.isnan(numbers[:, j]))
        if len(rows) and not filled[j]:
            raise table.wrong(int(rows[0]), name, table.column(name)[rows[0]])


def _plain(numbers: np.ndarray, known: columns.Categories, names: Sequence[str]) -> np.ndarray:
    """The numbers among the codes, for a look at their units."""
    numeric: np.ndarray = numbers[:, [n not in known for n in names]]
    return np.asarray(numeric[~np.isnan(numeric)])


def _counts(column: list[str]) -> bool:
    """Whether whole numbers go up by one from row to row."""
    if len(column) < 3 or not all(v.isascii() and v.isdigit() and len(v) < 16 for v in column):
        return False
    first = int(column[0])
    return all(int(v) == first + i for i, v in enumerate(column))


def unlabelled(path: Path, done: Preparation) -> Tensor:
    """Inputs of another file with these columns, prepared in the same way: [N, width]."""
    how = Format(done.separator, done.encoding, decimal=done.decimal, na=done.na)
    if path.suffix == frames.SUFFIX:
        table = frames.parquet(path, how)
    else:
        table = sheet.unnamed(path, how, done.header, done.target)
    if missing := [n for n in done.columns if n not in table.header]:
        raise ConfigError(f"{path} has no column {missing[0]!r}, which the model was trained on")
    table = table.only(done.columns)
    kinds = done.categories or [()] * len(done.columns)
    known = {n: c for n, c in zip(done.columns, kinds, strict=True) if c}
    numbers = columns.codes(table, done.columns, known)
    fill = done.fill or [None] * len(done.columns)
    marked = [n in known and done.missing not in ("", "drop") for n in done.columns]
    filled = [m or f is not None for m, f in zip(marked, fill, strict=True)]
    for j in np.flatnonzero(np.isnan(numbers).any(0) & ~np.array(filled)):
        row = int(np.flatnonzero(np.isnan(numbers[:, j]))[0])
        raise ConfigError(
            f"{table.place(row)}: column {done.columns[j]!r} holds a missing value, and the run filled "
            "none there: fill it, or leave the row out"
        )
    x = columns.encoded(numbers, done)
    if not bool(torch.isfinite(x).all()):
        raise ConfigError(f"{path} has NaN or infinite values; fill or drop those rows first")
    units.same(path, _plain(numbers, known, done.columns), done)
    return x
