"""Tables of typed columns: parquet files, and data frames of pandas or what looks like them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.data.sheet import Format, Sheet
from fedtorch.types import ConfigError

SUFFIX = ".parquet"

INDEX = "__index_level_"
"""Columns in which pandas keeps an index that has no name."""


def parquet(path: Path, how: Format = Format()) -> Sheet:
    """A parquet file (extra ``tables``)."""
    try:
        from pyarrow import parquet as reader
    except ImportError as e:
        raise ConfigError(f"{path}: parquet needs pyarrow: pip install 'fedtorch[tables]'") from e
    try:
        table = reader.read_table(disk.regular(path))
        columns = table.to_pydict()
    except (OSError, ValueError, NotImplementedError) as e:  # pyarrow's own errors are among these
        raise ConfigError(f"dataset.path must be a parquet file: {e}") from e
    known = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    index = [c for c in known if isinstance(c, str) and c in columns]
    nameless = [c for c in columns if c.startswith(INDEX)]
    # pandas writes an index last, where the target is looked for: it comes first, as in its CSV files
    order = [*index, *(c for c in columns if c not in index)]
    found = as_sheet(str(path), {c: columns[c] for c in order if c not in nameless}, how)
    return replace(found, notes=("pandas' index is left out",)) if nameless else found


def frame(df: Any, name: str) -> Sheet:
    """A data frame: its index is left out, categories and names are text."""
    if not all(hasattr(df, a) for a in ("columns", "__getitem__")):
        raise ConfigError(f"a data frame is asked for, but got a {type(df).__name__}")
    names = [str(c) for c in df.columns]
    if twice := [c for c in names if names.count(c) > 1]:
        raise ConfigError(f"{name} names column {twice[0]!r} twice")
    return as_sheet(name, {str(c): df[c].to_list() for c in df.columns}, Format())


def declared(df: Any) -> dict[str, list[str]]:
    """Categories of the columns whose type names them."""
    found = {str(c): getattr(df[c].dtype, "categories", None) for c in df.columns}
    return {c: [cell_text(v) for v in names] for c, names in found.items() if names is not None}


BAR = "|"
"""Sets categories apart where they are declared."""


def one_by_one(column: str, names: Iterable[Any]) -> str:
    """Categories of a column as an option declares them; raises ConfigError where that would part one."""
    texts = [cell_text(v) for v in names]
    if odd := [n for n in texts if BAR in n]:
        raise ConfigError(
            f"column {column!r} has a category {odd[0]!r}, and {BAR} sets categories apart: rename it"
        )
    return BAR.join(texts)


def as_sheet(path: str, columns: Mapping[str, Sequence[Any]], how: Format) -> Sheet:
    """Columns by name as text; rows count from 0."""
    if not columns or not len(next(iter(columns.values()))):
        raise ConfigError(f"{path} is empty")
    texts = [[cell_text(v) for v in values] for values in columns.values()]
    rows = [list(row) for row in zip(*texts, strict=True)]
    # a number is written with a point here, whatever other files do
    return Sheet(path, list(columns), rows, [0] * len(rows), Format(na=how.na))


def cell_text(value: Any) -> str:
    """One value as a file would have it; none, NaN and the like are spelled so."""
    return str(value.item() if hasattr(value, "item") else value).strip()
