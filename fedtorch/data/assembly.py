"""From the text of a table to data: which columns, which rows, scaled how; and new rows in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtorch.data import columns, frames, roles, separated, sheet, units
from fedtorch.data.base import Asks, Data, Preparation
from fedtorch.data.content import split
from fedtorch.data.options import TableOptions
from fedtorch.data.scaling import gap, gaps_in_words, scaled_and_filled, with_gaps
from fedtorch.data.sheet import Format, Sheet
from fedtorch.data.targets import Targets, from_targets, understood
from fedtorch.types import ConfigError

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
    persons: Sequence[str] | None
    parts: tuple[Tensor, Tensor]
    done: Preparation

    def data(self, done: Preparation) -> Data:
        """The data by this preparation."""
        x = columns.encoded(self.numbers, done)
        data = from_targets(self.name, x, self.y, self.keys, self.parts, done)
        if self.persons is None:
            return data
        return replace(data, persons=[self.persons[i] for i in self.parts[0].tolist()])

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
    # which columns are what
    target = roles.target(given, table)
    names, dropped, remarks = roles.features(given, table, target)
    keys, persons = roles.owners(given, table), roles.persons(given, table)
    used = [*names, target]
    n = len(table.rows)
    both = (
        table.only(used)
        if test is None
        else sheet.stacked(table.path, [table.only(used), test.only(used)])
    )
    # words become numbers, and gaps are dropped or refused
    known, found, notes = columns.categories(both, names, given.categories)
    numbers = columns.codes(both, names, known)
    if given.missing == "drop":
        kept = _whole_rows(both, numbers, target)
        numbers, both, n = numbers[kept], both.kept(kept.tolist()), int((kept < n).sum())
        keys = [keys[i] for i in kept[:n]] if keys else None
        persons = [persons[i] for i in kept[:n]] if persons else None
        notes.append("rows that lack a value are left out")
    whole = with_gaps(given, names, known)
    if place := gap(numbers, [n in whole for n in names]):
        row, name = place[0], names[place[1]]
        if name in known:
            raise both.lacks(row, name)
        raise both.wrong(row, name, both.column(name)[row])
    columns.fit(both, names, numbers)
    # targets, and which rows are held out
    y = understood(table.path, *roles.target_of(given, both, target))
    remarks += roles.unseen(given, both, target)
    if test is None:
        first = torch.tensor(numbers, dtype=torch.float32)
        parts = split([first, y.y, *([keys] if keys else [])], given.test_fraction, seed)
    else:
        parts = torch.arange(n), torch.arange(n, len(numbers))
    # one scale for all columns, by training rows alone
    scaling, words = scaled_and_filled(given, names, known, found, numbers[parts[0].numpy()])
    scaled = bool(words)
    # what was done, so that other rows can be prepared alike
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
        numbers=units.look(_numeric(numbers, known, names)),
        notes=(*both.notes, *notes, *gaps_in_words(given), *y.notes),
        found=tuple(found),
        derived=scaling.derived,
    )
    odd = columns.far_apart(numbers[parts[0].numpy()], done)
    done = replace(done, remarks=(*remarks, *([odd] if odd else [])))
    name = Path(table.path).stem if "*" not in table.path else Path(table.path).parent.name
    loaded = Loaded(name or "table", numbers, y, keys, persons, parts, done)
    data = loaded.data(done)
    return (
        replace(data, asks=_asks(given, loaded, whole)) if given.standardize == "private" else data
    )


def _whole_rows(table: Sheet, numbers: np.ndarray, target: str) -> np.ndarray:
    """Places of the rows that lack nothing."""
    gone = np.isnan(numbers).any(1) | [table.missing(v) for v in table.column(target)]
    if gone.all():
        raise ConfigError(f"{table.path}: every row lacks a value: leave columns out, or fill them")
    return np.flatnonzero(~gone)


def _asks(given: TableOptions, loaded: Loaded, filled: set[str]) -> Asks:
    """What a plan has to tell of the training rows before they can be scaled."""
    bounds, names = columns.ranges(given.bounds), loaded.done.columns
    at = [names.index(n) for n in bounds]
    rows = loaded.numbers[loaded.parts[0].numpy()][:, at]
    gaps = [j for j in at if names[j] in filled - columns.fills(given.fill).keys()]
    answer = partial(loaded.answered, at, gaps)
    return Asks(
        tuple(bounds), rows, tuple(bounds.values()), given.statistics, answer, loaded.settled
    )


def _numeric(numbers: np.ndarray, known: columns.Categories, names: Sequence[str]) -> np.ndarray:
    """The numbers among the codes, for a look at their units."""
    numeric: np.ndarray = numbers[:, [n not in known for n in names]]
    return np.asarray(numeric[~np.isnan(numeric)])


def unlabelled(path: Path, done: Preparation) -> Tensor:
    """Inputs of another file with these columns, prepared in the same way: [N, width]."""
    how = Format(done.separator, done.encoding, decimal=done.decimal, na=done.na)
    try:
        if path.suffix == frames.SUFFIX:
            return table_inputs(frames.parquet(path, how), path, done)
        return table_inputs(separated.unnamed(path, how, done.header, done.target), path, done)
    except ConfigError as e:
        what, option, _ = str(e).partition("--dataset.")
        if not option:
            raise
        point = "a comma" if done.decimal == "," else "a point"
        raise ConfigError(
            f"{what.partition('; ')[0]}; new rows are read as those that were trained on: in "
            f"{done.encoding or 'UTF-8'}, numbers with {point}, and words where words were"
        ) from e


def table_inputs(table: Sheet, path: Path, done: Preparation) -> Tensor:
    """Inputs of a table that came from ``path``, prepared so: [N, width]."""
    if missing := [n for n in done.columns if n not in table.header]:
        raise ConfigError(f"{path} has no column {missing[0]!r}, which the model was trained on")
    table = table.only(done.columns)
    kinds = done.categories or [()] * len(done.columns)
    known = {n: c for n, c in zip(done.columns, kinds, strict=True) if c}
    numbers = columns.codes(table, done.columns, known)
    fill = done.fill or [None] * len(done.columns)
    marked = [n in known and done.missing not in ("", "drop") for n in done.columns]
    if place := gap(numbers, [m or f is not None for m, f in zip(marked, fill, strict=True)]):
        raise ConfigError(
            f"{table.place(place[0])}: column {done.columns[place[1]]!r} holds a missing value, and the "
            "run filled none there: fill it, or leave the row out"
        )
    x = columns.encoded(numbers, done)
    if not bool(torch.isfinite(x).all()):
        raise ConfigError(f"{path} has NaN or infinite values; fill or drop those rows first")
    units.same(path, _numeric(numbers, known, done.columns), done)
    return x
