"""A table as text: names of its columns, its rows, and one sentence about what is wrong with it."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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

LOOKED_AT = 50
"""Lines that a separator is guessed from."""

SHOWN = 20
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
                "is in one of them alone"
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


def read(path: Path, how: Format = Format()) -> Sheet:
    """A file of lines; raises ConfigError where it is none, or its lines are not alike."""
    text, notes = _text(path, how.encoding)
    separator = SEPARATORS.get(how.separator, how.separator) or guessed(text, how.decimal)
    if separator != ",":
        notes.append(
            f"columns are separated by {'spaces' if separator == ' ' else repr(separator)}"
        )
    try:
        table = _lines(text, separator)
    except csv.Error as e:
        raise ConfigError(f"dataset.path must be a CSV file: {e}") from e
    if not table:
        raise ConfigError(f"{path} is empty")
    header = list(how.columns)
    if header and table[0][1] == header:
        raise ConfigError(f"{path} names its columns in its first line: leave out dataset.columns")
    if not header:
        (_, header), *table = table
    if not table:
        raise ConfigError(f"{path} has a header but no rows")
    for line, row in table:
        if len(row) != len(header):
            by = "dataset.columns" if how.columns else "the header"
            why = "separator may be another" if how.columns else "file may be cut short"
            why = misread.first_line(text) or f"; the {why}"
            raise ConfigError(
                f"{path}, line {line}: {len(row)} values, but {by} names {len(header)}{why}"
            )
    rows = [row for _, row in table]
    if not how.columns:
        _named(path, header, rows, how, misread.first_line(text))
    return Sheet(str(path), header, rows, [n for n, _ in table], how, tuple(notes))


def unnamed(path: Path, how: Format, header: Sequence[str], target: str) -> Sheet:
    """A file like one whose columns were named by hand, with the target or without, named or not."""
    if not header:
        return read(path, how)
    text, _ = _text(path, how.encoding)
    separator = SEPARATORS.get(how.separator, how.separator) or guessed(text, how.decimal)
    first = next(iter(_lines(text, separator)), (0, []))[1]
    short = tuple(h for h in header if h != target)
    if {*first} & {*header}:
        return read(path, how)
    names = short if len(first) == len(short) else tuple(header)
    return read(path, replace(how, columns=names))


def guessed(text: str, decimal: str = ".") -> str:
    """What cuts the first lines into the same number of values, the most of them; at worst a comma."""
    every = [line for line in text.splitlines() if line.strip()]
    lines, best, most = every[:LOOKED_AT], ",", 1
    # a comma may be a decimal one and a space part of a name: then they count where nothing else fits
    for separator in (*(",;\t|" if decimal == "." else ";\t|"), " ", ","):
        if most > 1 and (separator == " " or (separator == "," and decimal == ",")):
            continue
        try:
            rows = _lines("\n".join(lines), separator)
        except csv.Error:
            continue
        # the last may be cut inside a quoted value
        widths = {len(row) for _, row in (rows[:-1] if len(every) > LOOKED_AT else rows)}
        if len(widths) == 1 and (width := widths.pop()) > most:
            best, most = separator, width
    return best if most > 1 else max(",;\t|", key=lambda s: lines[0].count(s) if lines else 0)


def _lines(text: str, separator: str) -> list[tuple[int, list[str]]]:
    if separator == " ":  # columns may be set apart, and lines set in, by several
        text = "\n".join(line.strip() for line in text.splitlines())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    cells = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
    return [(line, row) for line, row in cells if row not in ([], [""])]


def _text(path: Path, encoding: str) -> tuple[str, list[str]]:
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"dataset.path must be a CSV file: {e}") from e
    marked = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    # utf-8-sig: spreadsheets write a byte order mark that would be part of the first name
    used = encoding or marked or "utf-8-sig"
    if not encoding and (kind := misread.file(raw)):
        raise ConfigError(f"dataset.path must be a CSV file, and {path} is {kind}")
    try:
        text = raw.decode("utf-8-sig" if used.lower() in ("utf-8", "utf8") else used)
    except LookupError as e:
        raise ConfigError(f"dataset.encoding {encoding!r} is none that Python knows") from e
    except UnicodeError as e:
        fix = "save it as UTF-8" if encoding else "give --dataset.encoding latin-1, or what it is"
        raise ConfigError(
            f"dataset.path must be a CSV file in {encoding or 'UTF-8'}: {path} is not ({e}); {fix}"
        ) from e
    return text, [f"read as {used}"] if used != "utf-8-sig" else []


def _named(path: Path, header: list[str], rows: list[list[str]], how: Format, odd: str) -> None:
    """Raises ConfigError where the first line is an example, or names are missing or there twice."""
    plain = Sheet("", [], [], [], how)
    values = [h for j, h in enumerate(header) if h != str(j) and plain.number(h) is not None]
    fractions = [h for h in values if not h.lstrip("+-").isdigit()]
    everything = all(plain.number(h) is not None or plain.missing(h) for h in header)
    known = bool(header[-1]) and len(rows) > 2 and any(row[-1] == header[-1] for row in rows)
    if fractions or (everything and any(header)) or known:
        raise ConfigError(
            f"{path} has no header: its first line reads {','.join(header)[:60]!r}, which is an example; "
            f"name its {len(header)} columns in order with --dataset.columns a,b,..., or in a line on top"
        )
    twice = [h for h, n in Counter(header).items() if n > 1]
    if twice:
        raise ConfigError(
            f"{path} names column {twice[0]!r} twice: give each a name of its own in its first line"
        )
    empty = [j for j, h in enumerate(header) if not h and j]
    if empty:
        raise ConfigError(
            f"{path}: column {empty[0] + 1} has no name"
            + (
                odd
                or "; only an index, the first, may lack it: name it, or take out what ends each line"
            )
        )
