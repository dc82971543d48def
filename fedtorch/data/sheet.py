"""A table as text: names of its columns, its rows, and one sentence about what is wrong with it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedtorch.data import misread
from fedtorch.data.misread import COMMA
from fedtorch.types import ConfigError

NUMBER = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.I
)
"""Pattern of a number; Python's float() takes more (1_000)."""

DIGITS = frozenset("0123456789.+-eE")
"""Of these characters float() reads what NUMBER matches."""

MISSING = frozenset(("", "?", "na", "n/a", "#n/a", "nan", "nat", "null", "none", "<na>", "-"))
"""Spellings of a missing value, in small letters."""

TRUTH = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}

SEPARATORS = {"space": " ", "tab": "\t", "\\t": "\t"}
"""Separators by name."""

LETTERS = 20
"""Characters of a value that a message shows of many."""


@dataclass(frozen=True)
class Format:
    """How tables are written; what is left empty is guessed, and said."""

    separator: str = ""
    encoding: str = ""
    columns: tuple[str, ...] = ()
    """Names, where the file has no line of them."""
    decimal: str = "."
    na: tuple[str, ...] = ()
    """Further spellings of a missing value."""

    def __post_init__(self) -> None:
        """Refuse what separates nothing."""
        if self.decimal not in (".", ","):
            raise ConfigError(f"dataset.decimal must be '.' or ',', got {self.decimal!r}")
        if self.separator and len(SEPARATORS.get(self.separator, self.separator)) != 1:
            raise ConfigError(
                f"dataset.separator must be one character, tab or space, got {self.separator!r}"
            )
        if twice := [c for c, n in Counter(self.columns).items() if n > 1 or not c]:
            raise ConfigError(f"dataset.columns must name each column once, but has {twice[0]!r}")


@dataclass(frozen=True)
class Sheet:
    """Column names, rows, and the line of which file each row ends on (0: a table without lines)."""

    path: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    how: Format = Format()
    notes: tuple[str, ...] = ()
    """What was guessed of the file, in words."""
    files: list[str] = field(default_factory=list)
    """The file of each row, where they are several."""

    def column(self, name: str) -> list[str]:
        """Its values as they are written."""
        j = self.header.index(name)
        return [row[j] for row in self.rows]

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, [N] float64, NaN where one is missing.

        Raises ConfigError that names line and column of what is none.
        """
        if (plain := self.plain(name)) is not None:
            return plain
        found = np.empty(len(self.rows))
        for i, text in enumerate(self.column(name)):
            value = self.number(text)
            if value is None and not self.missing(text):
                raise self.wrong(i, name, text)
            found[i] = np.nan if value is None else value
        return found

    def plain(self, name: str) -> np.ndarray | None:
        """A column in which every value is a number and looks like one at once; None: look at each."""
        values = self.column(name)
        if self.how.na or not DIGITS.issuperset("".join(values)):
            return None
        try:
            return np.array([float(v) for v in values])
        except ValueError:
            return None

    def number(self, text: str) -> float | None:
        """The number that is written, or None."""
        text = text.replace(",", ".") if self.how.decimal == "," and COMMA.fullmatch(text) else text
        return float(text) if NUMBER.fullmatch(text) and text not in self.how.na else None

    def missing(self, text: str) -> bool:
        """Whether it stands for a missing value."""
        return text.lower() in MISSING or text in self.how.na

    def place(self, row: int) -> str:
        """Where a row stands, for a message."""
        path = self.files[row] if self.files else self.path
        return f"{path}, {'line' if self.lines[row] else 'row'} {self.lines[row] or row}"

    def lacks(self, row: int, column: str) -> ConfigError:
        """The fix for a category that is missing."""
        return ConfigError(
            f"{self.place(row)}: column {column!r} lacks a category; --dataset.missing indicator counts "
            "such rows with categories that nobody declared, drop leaves them out"
        )

    def wrong(self, row: int, column: str, text: str, target: bool = False) -> ConfigError:
        """The fix for a value that is no number; of a ``target`` nothing can be made up."""
        fix = misread.label(text, column) if target else misread.value(text, column)
        if self.missing(text):
            fix = "a missing value: --dataset.missing drop leaves such rows out"
            if not target:
                fix += (
                    "; mean, median or indicator fill it, or a public number: "
                    f"--dataset.fill {column}=NUMBER"
                )
        return ConfigError(
            f"{self.place(row)}: column {column!r} holds {text[:60]!r}, not a number; {fix}"
        )

    def kept(self, rows: Sequence[int]) -> "Sheet":
        """These rows alone."""
        return replace(
            self,
            rows=[self.rows[i] for i in rows],
            lines=[self.lines[i] for i in rows],
            files=[self.files[i] for i in rows] if self.files else [],
        )

    def only(self, columns: Sequence[str]) -> "Sheet":
        """These columns alone; raises ConfigError where one is not there."""
        if lost := [c for c in columns if c not in self.header]:
            raise ConfigError(
                f"{self.path} has no column {lost[0]!r}; it has {', '.join(self.header)}"
            )
        at = [self.header.index(c) for c in columns]
        return replace(self, header=list(columns), rows=[[row[j] for j in at] for row in self.rows])


def stacked(path: str, sheets: Sequence[Sheet]) -> Sheet:
    """Tables with the same columns, one below the other; raises ConfigError where they differ."""
    first = sheets[0]
    for other in sheets[1:]:
        if sorted(other.header) != sorted(first.header):
            apart = sorted({*other.header} ^ {*first.header})
            raise ConfigError(
                f"{other.path} does not have the columns of {first.path}: {', '.join(apart[:5])} "
                "is in one of them alone; give files of the same columns"
            )
    at = [[s.header.index(h) for h in first.header] for s in sheets]
    return Sheet(
        path,
        first.header,
        [[row[j] for j in order] for s, order in zip(sheets, at, strict=True) for row in s.rows],
        [n for s in sheets for n in s.lines],
        first.how,
        tuple(dict.fromkeys(n for s in sheets for n in s.notes)),
        [f for s in sheets for f in s.files or [s.path] * len(s.rows)],
    )
