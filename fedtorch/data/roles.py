"""What each column of a table is for: to learn from, to be predicted, or to say who holds a row."""

from pathlib import Path

import numpy as np

from fedtorch.data import columns
from fedtorch.data.options import TableOptions
from fedtorch.data.sheet import Sheet
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

TARGETS = {"y", "target", "label", "class", "outcome"}
"""Columns that are asked about where the last, which is another, would be the target."""

INDEX = "Unnamed: 0"
"""Pandas' name for an index without one."""


def target(given: TableOptions, table: Sheet) -> str:
    """The column that is named as such, else the last; raises ConfigError where either may be meant."""
    last = table.header[-1]
    if given.target or last.lower() in TARGETS:
        return given.target or last
    known = {*given.features, *given.drop, given.client, given.person}
    for name in table.header[:-1]:
        if name.lower() in TARGETS and name not in known:
            raise ConfigError(
                f"{table.path}: is {name!r} to be predicted, or the last column, {last!r}? Give "
                f"--dataset.target {name} or --dataset.target {last}"
            )
    return last


def features(
    given: TableOptions, table: Sheet, target: str
) -> tuple[list[str], list[str], list[str]]:
    """Features, columns that are left out, and what looks odd about them."""
    header, remarks = table.header, []
    for role, names in (
        ("target", [target]),
        ("client", [given.client] if given.client else []),
        ("person", [given.person] if given.person else []),
        ("feature", given.features),
        ("dropped", given.drop),
    ):
        for column in names:
            if column not in header or not column:
                raise ConfigError(
                    f"{table.path} has no {role} column {column!r}; it has {', '.join(header)}"
                )
    if target in given.drop or target == given.client:
        what = "leaves out" if target in given.drop else "takes for who holds a row"
        raise ConfigError(
            f"{table.path}: {target!r} is what is to be predicted, and dataset."
            f"{'drop' if target in given.drop else 'client'} {what} that column: name another by "
            "--dataset.target"
        )
    index = [h for h in header[:1] if h in ("", INDEX) and h not in given.features]
    known = {target, given.client or target, given.person or target}
    left = [h for h in header if h not in known]
    names = given.features or [h for h in left if h not in (*given.drop, *index)]
    if not names or known & {*names}:
        raise ConfigError(
            f"{table.path} has no feature columns beside {target!r}: name others in dataset.features, or "
            "drop fewer"
        )
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


def _counts(column: list[str]) -> bool:
    """Whether whole numbers go up by one from row to row."""
    if len(column) < 3 or not all(v.isascii() and v.isdigit() and len(v) < 16 for v in column):
        return False
    first = int(column[0])
    return all(int(v) == first + i for i, v in enumerate(column))


def owners(given: TableOptions, table: Sheet) -> list[str] | None:
    """Who holds each row, as a column or its file says; None: nothing does."""
    if not given.client:
        return [Path(f).stem for f in table.files] or None
    return _named(table, given.client)


def persons(given: TableOptions, table: Sheet) -> list[str] | None:
    """Whose each row is, as a column says; None: none does."""
    return _named(table, given.person) if given.person else None


def _named(table: Sheet, column: str) -> list[str]:
    names = table.column(column)
    for i, name in enumerate(names):
        if table.missing(name):
            what = f"holds {name!r}, a missing value" if name else "is empty"
            raise ConfigError(f"{table.place(i)}: column {column!r} {what}: whose row is it?")
    return names


def target_of(given: TableOptions, table: Sheet, target: str) -> tuple[np.ndarray, str, list[str]]:
    """Numbers, truth values, or names; the kind, and the names of the classes."""
    written, kind = table.column(target), given.kind
    numbers = [table.number(v) for v in written]
    gone = [i for i, v in enumerate(written) if table.missing(v)]
    if gone:
        raise table.wrong(gone[0], target, written[gone[0]], target=True)
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
    words = [i for i, n in enumerate(numbers) if n is None]
    if not words or kind == "regression":
        return table.numbers(target), kind, given.classes
    named = kind != "auto" or given.classes or len(words) == len(written)
    if not named or not all(written[i].isprintable() for i in words):
        raise table.wrong(words[0], target, written[words[0]], target=True)
    return np.array(written), kind, given.classes


def unseen(given: TableOptions, table: Sheet, target: str) -> list[str]:
    """What looks odd about the positive values: one that is misspelt would be found in no row."""
    there = {columns.key(table, v) for v in table.column(target)}
    never = [v for v in given.positive if columns.key(table, v) not in there]
    return [f"no row's {target!r} is {' or '.join(never)} (dataset.positive)"] if never else []
