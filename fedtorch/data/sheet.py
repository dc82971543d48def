"""A CSV file as text: its header, its rows, and one sentence about what is wrong with it."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtorch.types import ConfigError

NUMBER = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.I
)
"""Pattern of a number; Python's float() takes more (1_000)."""

COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)

MISSING = {"", "?", "na", "n/a", "null", "none", "-"}
"""Spellings of a missing value."""


@dataclass(frozen=True)
class Sheet:
    """Column names, rows, and the line of the file each row ends on."""

    path: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    decimal: str = "."
    separator: str = ","

    def column(self, name: str) -> list[str]:
        """Its values as they are written."""
        j = self.header.index(name)
        return [row[j] for row in self.rows]

    def numbers(self, columns: Sequence[str]) -> list[list[float]]:
        """Rows of numbers; raises ConfigError that names line and column of what is none."""
        at = [self.header.index(c) for c in columns]
        table = []
        for line, row in zip(self.lines, self.rows, strict=True):
            values = [self.number(row[j]) for j in at]
            if None in values:
                bad = columns[values.index(None)]
                raise self.wrong(line, bad, row[self.header.index(bad)])
            table.append([v for v in values if v is not None])
        return table

    def number(self, text: str) -> float | None:
        """The number that is written, or None."""
        text = text.replace(",", ".") if self.decimal == "," and COMMA.fullmatch(text) else text
        return float(text) if NUMBER.fullmatch(text) else None

    def wrong(self, line: int, column: str, text: str) -> ConfigError:
        """The fix for a value that is no number."""
        fix = "encode or drop it, or name it as dataset.client"
        if text.lower() in MISSING:
            fix = "a missing value: fill it or drop that row first"
        elif COMMA.fullmatch(text):
            fix = "a decimal comma? then give --dataset.decimal ,"
        return ConfigError(
            f"{self.path}, line {line}: column {column!r} holds {text[:60]!r}, not a number; {fix}"
        )


def read(path: Path, decimal: str = ".") -> Sheet:
    """The file as text; the separator is the one that its header uses: , ; or tab."""
    if decimal not in (".", ","):
        raise ConfigError(f"dataset.decimal must be '.' or ',', got {decimal!r}")
    text = _text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(",;\t", key=lambda s: (first.count(s), s == ","))
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True
        )
        cells = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
        table = [(line, row) for line, row in cells if row not in ([], [""])]
    except csv.Error as e:
        raise ConfigError(f"dataset.path must be a CSV file: {e}") from e
    if not table:
        raise ConfigError(f"{path} is empty")
    (_, header), *rest = table
    if not rest:
        raise ConfigError(f"{path} has a header but no rows")
    for line, row in rest:
        if len(row) != len(header):
            raise ConfigError(
                f"{path}, line {line}: {len(row)} values, but the header names {len(header)}; "
                "the file may be cut short"
            )
    _named(path, header, [row for _, row in rest])
    rows = [row for _, row in rest]
    return Sheet(str(path), header, rows, [n for n, _ in rest], decimal, separator)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"dataset.path must be a CSV file: {e}") from e
    try:
        # utf-8-sig: spreadsheets write a byte order mark that would be part of the first name
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        looks = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "Latin-1 or another encoding"
        raise ConfigError(
            f"dataset.path must be a CSV file in UTF-8: {path} is not (byte {e.start}; it may be {looks}): "
            "save it as UTF-8"
        ) from e


def _named(path: Path, header: list[str], rows: list[list[str]]) -> None:
    """Raises ConfigError where the first line is an example, or names are missing or there twice."""
    plain = Sheet("", [], [], [])
    values = [h for j, h in enumerate(header) if h != str(j) and plain.number(h) is not None]
    fractions = [h for h in values if not h.lstrip("+-").isdigit()]
    everything = all(plain.number(h) is not None or h in MISSING for h in header) and any(header)
    known = bool(header[-1]) and len(rows) > 2 and any(row[-1] == header[-1] for row in rows)
    if fractions or everything or known:
        raise ConfigError(
            f"{path} has no header: its first line reads {','.join(header)[:60]!r}, which is an example; "
            "add a line that names the columns"
        )
    twice = [h for h, n in Counter(header).items() if n > 1]
    if twice:
        raise ConfigError(f"{path} names column {twice[0]!r} twice")
    empty = [j for j, h in enumerate(header) if not h and j]
    if empty:
        raise ConfigError(
            f"{path}: column {empty[0] + 1} has no name; only an index, the first, may lack it"
        )
