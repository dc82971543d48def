"""Tables as people have them: CSV, TSV and parquet files, one or several, and data frames."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from glob import glob
from pathlib import Path
from typing import Any

from fedtorch.data import frames, separated, sheet
from fedtorch.data.assembly import assembled
from fedtorch.data.base import Data
from fedtorch.data.options import TableOptions
from fedtorch.data.sheet import Format, Sheet
from fedtorch.types import ConfigError

SUFFIXES = (".csv", ".tsv", ".data", frames.SUFFIX)
"""Files of a folder that are tables."""


@dataclass(frozen=True)
class Csv(TableOptions):
    """Tables: CSV, TSV or parquet files; the target may hold names, and so may features, if declared."""

    path: str = ""
    """A file, a folder of them, or a pattern such as 'data/*.csv'; several files are a client each."""

    def load(self, seed: int) -> Data:
        """X [N, inputs], y [N]."""
        try:
            test = _files(self.test, self.how) if self.test else None
        except ConfigError as e:
            raise ConfigError(str(e).replace("dataset.path", "dataset.test")) from e
        return assembled(self, _files(self.path, self.how), test, seed)


def from_pandas(
    df: Any,
    *,
    test: Any = None,
    seed: int = 0,
    bounds: Mapping[str, tuple[float, float]] | Sequence[str] = (),
    categories: Mapping[str, Sequence[Any]] | Sequence[str] = (),
    fill: Mapping[str, float] | Sequence[str] = (),
    **options: Any,
) -> Data:
    """Data of a pandas ``DataFrame`` with the options of ``Csv``; its index is left out.

    ``test``: a data frame of its own. ``bounds={"age": (20, 90)}``, ``categories={"ward": ["a", "b"]}`` and
    ``fill={"chol": 240}`` may be tables; a column of pandas' type ``category`` declares its own. Raises
    ConfigError as the command does.
    """
    known = {f.name for f in fields(TableOptions)}
    if unknown := [o for o in options if o not in known]:
        raise ConfigError(f"from_pandas has no option {unknown[0]!r}; it has {', '.join(known)}")
    table = frames.frame(df, "the data frame")
    own = frames.declared(df)
    roles = (
        options.get("target") or table.header[-1],
        options.get("client"),
        options.get("person"),
    )
    options["bounds"] = _entries(bounds, lambda _, b: f"{b[0]}:{b[1]}")
    options["fill"] = _entries(fill, lambda _, value: str(value))
    given = _entries(categories, frames.one_by_one)
    taken = {*(e.partition("=")[0] for e in given), *roles, *options.get("drop", ())}
    options["categories"] = [
        *given,
        *(f"{c}={frames.one_by_one(c, n)}" for c, n in own.items() if c not in taken),
    ]
    if len(own.get(roles[0], ())) > 1 and options.get("kind") != "regression":
        options.setdefault("classes", own[roles[0]])
    held = None if test is None else frames.frame(test, "the test data frame")
    return assembled(TableOptions(**options), table, held, seed)


def _entries(
    table: Mapping[str, Any] | Sequence[str], written: Callable[[str, Any], str]
) -> list[str]:
    if not isinstance(table, Mapping):
        return [*table]
    return [f"{k}={written(k, v)}" for k, v in table.items()]


def _files(path: str, how: Format) -> Sheet:
    """The table in a file, or in those of a folder or a pattern."""
    if not path:
        raise ConfigError("dataset.path must be a CSV file, or a folder of them")
    place = Path(path).expanduser()
    found = [place]
    if place.is_dir():
        found = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise ConfigError(
                f"dataset.path must be a CSV file: the folder {path} has none ({', '.join(SUFFIXES)}); a "
                "pattern such as 'folder/*.txt' takes other names"
            )
    elif not place.exists() and any(c in path for c in "*?["):
        found = [Path(p) for p in sorted(glob(str(place)))]
        if not found:
            raise ConfigError(
                f"dataset.path {path!r}: no file is called so; a pattern stands for names, as in "
                "'folder/*.csv'"
            )
    read = [
        (frames.parquet if p.suffix == frames.SUFFIX else separated.read)(p, how) for p in found
    ]
    return sheet.stacked(path, read) if len(read) > 1 else read[0]
