"""Files of values that a separator keeps apart; what nobody says of one is guessed, and said."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedtorch import disk
from fedtorch.data import misread
from fedtorch.data.sheet import SEPARATORS, Format, Sheet
from fedtorch.types import ConfigError

LINES = 50
"""Lines that a separator is guessed from."""


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
        _check_header(path, header, rows, how, misread.first_line(text))
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
    lines, best, most = every[:LINES], ",", 1
    # a comma may be a decimal one and a space part of a name: then they count where nothing else fits
    for separator in (*(",;\t|" if decimal == "." else ";\t|"), " ", ","):
        if most > 1 and (separator == " " or (separator == "," and decimal == ",")):
            continue
        try:
            rows = _lines("\n".join(lines), separator)
        except csv.Error:
            continue
        # the last may be cut inside a quoted value
        widths = {len(row) for _, row in (rows[:-1] if len(every) > LINES else rows)}
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
        raw = disk.regular(path).read_bytes()
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
        raise ConfigError(
            f"dataset.encoding {encoding!r} is none that Python knows: give utf-8, latin-1 or cp1252"
        ) from e
    except UnicodeError as e:
        fix = "save it as UTF-8" if encoding else "give --dataset.encoding latin-1, or what it is"
        raise ConfigError(
            f"dataset.path must be a CSV file in {encoding or 'UTF-8'}: {path} is not ({e}); {fix}"
        ) from e
    return text, [f"read as {used}"] if used != "utf-8-sig" else []


def _check_header(
    path: Path, header: list[str], rows: list[list[str]], how: Format, odd: str
) -> None:
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
