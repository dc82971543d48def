"""What a file or value is that was taken for a table or a number, and the fix, in words."""

import re

DATE = re.compile(
    r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})([T ]\d{1,2}:\d{2}.*)?"
    r"|(-?\d+ days?,? )?[+-]?\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?",
    re.ASCII,
)

COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)

GROUPED = re.compile(
    r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?|[+-]?\d{1,3}(['\u2019  ]\d{3})+([.,]\d*)?", re.ASCII
)
"""Thousands set apart."""

WITH_SIGN = re.compile(r"[$€£¥~<>≤≥(\u2212-]\s?\d[\d.,]*\)?|[+-]?\d[\d.,]*\s?[%‰€£¥$)]")
"""A number with a sign of its kind."""

NO_TABLES = {
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"PK\x03\x04": "a zip archive, as spreadsheets are: save the table as CSV",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet: save the table as CSV",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"%PDF": "a PDF: save the table as CSV",
    b"SQLite": "a database: export the table as CSV",
    b"PAR1": "parquet: name it so, .parquet",
    b"{": "JSON: save the table as CSV, or give a data frame to fedtorch.from_pandas",
    b"[": "JSON: save the table as CSV, or give a data frame to fedtorch.from_pandas",
    b"<": "a page, or XML: is it what was to be downloaded?",
}
"""First bytes of files that are no tables of text."""


def file(raw: bytes) -> str:
    """What a file is rather than a table of text; empty: nothing that is known."""
    start = raw[:64].lstrip()
    return next((words for mark, words in NO_TABLES.items() if start.startswith(mark)), "")


def first_line(text: str) -> str:
    """The fix where the first line is no header; empty: it may be one."""
    line = text.lstrip("\ufeff").partition("\n")[0].strip()
    if line.lower().startswith("sep="):
        return f"; line 1 is a spreadsheet's mark: take it out, and give --dataset.separator {line[4:]!r}"
    if line.startswith(("#", "%", "@", "//")):
        return "; line 1 looks like a remark: take such lines out"
    return ""


def number(text: str) -> bool:
    """Whether it is meant as a number, a date or a time, and not as a name."""
    return any(p.fullmatch(text) for p in (DATE, COMMA, GROUPED, WITH_SIGN))


def value(text: str, column: str) -> str:
    """The fix for a value of a column that is no number."""
    if GROUPED.fullmatch(text):
        comma = "; or, if it is a decimal comma, give --dataset.decimal ,"
        return f"thousands that are set apart? take the signs out{comma if COMMA.fullmatch(text) else ''}"
    if COMMA.fullmatch(text):
        return "a decimal comma? then give --dataset.decimal ,"
    if DATE.fullmatch(text):
        return (
            "a date or time: give days since a day of your choice as a number, or leave it out with "
            f"--dataset.drop {column}"
        )
    if WITH_SIGN.fullmatch(text):
        return f"take its sign out of the column, or leave it out with --dataset.drop {column}"
    return (
        "encode or drop it, or name it as dataset.client; if it stands for a missing value: "
        f"--dataset.na {text[:20]!r}"
    )


def label(text: str, column: str) -> str:
    """The fix for a target that is no number where others are."""
    return (
        f"where {column!r} holds classes give --dataset.kind classification; if it stands for a missing "
        f"value: --dataset.na {text[:20]!r} --dataset.missing drop"
    )
