"""Tables: CSV and NPZ files, with an optional column that names each row's client."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtorch.data import sheet, units
from fedtorch.data.base import Data, Preparation, from_tensors
from fedtorch.data.content import split
from fedtorch.data.images import inputs
from fedtorch.data.sheet import Sheet
from fedtorch.data.targets import Targets, understood
from fedtorch.options import POSITIVE, SHARE, check
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


@dataclass(frozen=True)
class Csv:
    """A CSV file with a header; features must be numbers in every row, the target may hold names."""

    path: str = ""
    """The file, UTF-8; columns are separated by , ; or tab."""
    _: KW_ONLY
    target: str = ""
    """Column to predict; empty: the last one."""
    client: str = ""
    """Column that names each row's owner; empty: none."""
    kind: str = "auto"
    """classification, binary, regression, or auto: asked for where whole numbers could be either."""
    standardize: bool = False
    """Scale features by the training rows' mean and standard deviation (seen by the server)."""
    test_fraction: float = 0.2
    """Share of rows kept for the central test, each by its content; 0: none."""
    features: list[str] = field(default_factory=list)
    """Columns to learn from; none given: all but the target's, the client's and those dropped."""
    drop: list[str] = field(default_factory=list)
    """Columns to leave out."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in order, where files of several sites must agree; none: sorted."""
    decimal: str = "."
    """Decimal separator: . or ,"""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing."""
        check(self, "dataset", test_fraction=SHARE)

    def load(self, seed: int) -> Data:
        """X [N, columns], y [N]."""
        table = sheet.read(Path(self.path), self.decimal)
        target = self.target or table.header[-1]
        names, dropped, notes = self._columns(table, target)
        numbers = np.array(table.numbers(names))
        x = torch.tensor(numbers, dtype=torch.float32)
        y = understood(self.path, self._target(table, target), self.kind, self.classes)
        keys = self._owners(table) if self.client else None
        train, test = _split(x, y.y, keys, self.test_fraction, seed)
        mean, deviation = x[train].mean(0), x[train].std(0)
        mean, deviation = (
            mean[: 0 if not self.standardize else None],
            torch.where(deviation > 0, deviation, 1),
        )
        done = Preparation(
            classes=y.classes,
            columns=tuple(names),
            target=target,
            client=self.client,
            dropped=tuple(dropped),
            decimal=self.decimal,
            mean=tuple(mean.tolist()),
            deviation=tuple(deviation.tolist()) if self.standardize else (),
            numbers=units.look(numbers),
            notes=(*notes, *y.notes),
        )
        return _data(Path(self.path).stem, standardised(x, done), y, keys, train, test, done)

    def _columns(self, table: Sheet, target: str) -> tuple[list[str], list[str], list[str]]:
        """Features, columns that are left out, and what is to be said about them."""
        header, notes = table.header, []
        if table.separator != ",":
            notes.append(f"columns are separated by {table.separator!r}")
        for role, columns in (
            ("target", [target]),
            ("client", [self.client] if self.client else []),
            ("feature", self.features),
            ("dropped", self.drop),
        ):
            for column in columns:
                if column not in header or not column:
                    raise ConfigError(
                        f"{self.path} has no {role} column {column!r}; it has {', '.join(header)}"
                    )
        index = [h for h in header[:1] if h in ("", INDEX) and h not in self.features]
        left = [h for h in header if h != target and not (self.client and h == self.client)]
        names = self.features or [h for h in left if h not in (*self.drop, *index)]
        if not names or target in names or (self.client and self.client in names):
            raise ConfigError(f"{self.path} has no feature columns beside {target!r}")
        for name in () if self.features else names:
            if name.lower().removesuffix("_id").removesuffix(" id") in OWNERS and not self.client:
                table.numbers([name])  # where they are none, that is the first thing to say
                raise ConfigError(
                    f"{self.path}: does column {name!r} say who holds a row? Then give --dataset.client "
                    f"{name}; else leave it out with --dataset.drop {name}, or name every column to learn "
                    "from with --dataset.features"
                )
            if _counts(table.column(name)):
                notes.append(
                    f"{name!r} counts the rows: if it is an index, give --dataset.drop {name}"
                )
        return names, [h for h in left if h not in names], notes

    def _target(self, table: Sheet, target: str) -> np.ndarray:
        """Numbers, truth values, or names."""
        written = table.column(target)
        numbers = [table.number(v) for v in written]
        if {v.lower() for v in written} <= {"true", "false"}:
            return np.array([v.lower() == "true" for v in written])
        names = [n for n, v in zip(numbers, written, strict=True) if n is None and v.isprintable()]
        missing = any(v.lower() in sheet.MISSING for v in written)
        if len(names) < len(written) or missing or self.kind == "regression":
            return np.array(table.numbers([target]))[:, 0]
        return np.array(written)

    def _owners(self, table: Sheet) -> list[str]:
        owners = table.column(self.client)
        if "" in owners:
            line = table.lines[owners.index("")]
            raise ConfigError(
                f"{self.path}, line {line}: column {self.client!r} is empty: whose row is it?"
            )
        return owners


def standardised(x: Tensor, done: Preparation) -> Tensor:
    """Features [N, columns] scaled as the training rows were, or as they are."""
    if not done.mean:
        return x
    return (x - torch.tensor(done.mean)) / torch.tensor(done.deviation)


def unlabelled(path: Path, done: Preparation) -> Tensor:
    """Features of another file with these columns, prepared in the same way: [N, columns]."""
    table = sheet.read(path, done.decimal)
    if missing := [n for n in done.columns if n not in table.header]:
        raise ConfigError(f"{path} has no column {missing[0]!r}, which the model was trained on")
    numbers = np.array(table.numbers(done.columns))
    x = torch.tensor(numbers, dtype=torch.float32)
    if not bool(torch.isfinite(x).all()):
        raise ConfigError(f"{path} has NaN or infinite values; fill or drop those rows first")
    units.same(path, numbers, done)
    return standardised(x, done)


@dataclass(frozen=True)
class Npz:
    """A NumPy archive with arrays x and y, and optionally client, x_test and y_test."""

    path: str = ""
    """The file."""
    _: KW_ONLY
    kind: str = "auto"
    """classification, binary, regression, or auto: asked for where whole numbers could be either."""
    test_fraction: float = 0.2
    """Share kept for the central test where there is no x_test; 0: none."""
    scale: float | None = None
    """Divisor of x; none: 255 for images of uint8, 65535 of uint16, else 1."""
    channels_last: bool | None = None
    """Whether images are [N, rows, columns, channels]; none: asked for where they seem to be."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in order, where files of several sites must agree; none: sorted."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing, and scales that are none."""
        check(self, "dataset", test_fraction=SHARE, scale=POSITIVE)

    def load(self, seed: int) -> Data:
        """X [N, ...] as float32 (int64 stays: numbers of a vocabulary), y [N]."""
        arrays = _arrays(self.path)
        x, y = _rows(self.path, arrays, "x"), _rows(self.path, arrays, "y", "biufUS")
        keys = _owners(self.path, arrays["client"]) if "client" in arrays else None
        _same_rows(self.path, x=len(x), y=len(y), client=len(keys) if keys is not None else len(x))
        own = "x_test" in arrays or "y_test" in arrays
        n = len(x)
        if own:
            x_test, y_test = (
                _rows(self.path, arrays, "x_test"),
                _rows(self.path, arrays, "y_test", "biufUS"),
            )
            _same_rows(self.path, x_test=len(x_test), y_test=len(y_test))
            if x_test.shape[1:] != x.shape[1:] or y_test.shape[1:] != y.shape[1:]:
                raise ConfigError(f"{self.path}: x_test and y_test must have the shape of x and y")
            if x_test.dtype != x.dtype:
                raise ConfigError(f"{self.path}: x is {x.dtype} but x_test {x_test.dtype}")
            x, y = np.concatenate([x, x_test]), np.concatenate([y, y_test])
        y = np.char.decode(y, "utf-8") if y.dtype.kind == "S" else y
        given, done = inputs(self.path, x, self.scale, self.channels_last)
        found = understood(self.path, y, self.kind, self.classes)
        if own:
            train, test = torch.arange(n), torch.arange(n, len(x))
        else:
            train, test = _split(given, found.y, keys, self.test_fraction, seed)
        done = replace(done, classes=found.classes, notes=(*done.notes, *found.notes))
        return _data(Path(self.path).stem, given, found, keys, train, test, done)


def _split(
    x: Tensor, y: Tensor, keys: list[str] | None, fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    columns: list[Tensor | Sequence[str]] = [x, y, keys] if keys else [x, y]
    return split(columns, fraction, seed)


def _data(
    name: str,
    x: Tensor,
    y: Targets,
    keys: list[str] | None,
    train: Tensor,
    test: Tensor,
    done: Preparation,
) -> Data:
    if not bool(torch.isfinite(x.double()).all()):
        raise ConfigError(f"{name} has NaN or infinite values; fill or drop those rows first")
    owners = [keys[i] for i in train.tolist()] if keys else None
    facts = {"num_outputs": y.outputs, "out_features": y.outputs} if y.kind == "binary" else {}
    return from_tensors(
        name, (x[train], y.y[train]), (x[test], y.y[test]), y.kind, y.outputs, owners, done, **facts
    )


def _counts(column: list[str]) -> bool:
    """Whether whole numbers go up by one from row to row."""
    if len(column) < 3 or not all(v.isascii() and v.isdigit() and len(v) < 16 for v in column):
        return False
    first = int(column[0])
    return all(int(v) == first + i for i, v in enumerate(column))


def _arrays(path: str) -> dict[str, np.ndarray]:
    try:
        # allow_pickle=False: a foreign file must not run code here
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError(
                    "it holds one array without a name; write np.savez(path, x=x, y=y)"
                )
            with archive:
                return {k: archive[k] for k in archive.files}
    except Exception as e:  # zip, zlib and NumPy each have errors of their own for damaged files
        raise ConfigError(f"{path!r} cannot be read as an NPZ file: {e}") from e


def _owners(path: str, owners: np.ndarray) -> list[str]:
    if owners.ndim != 1 or owners.dtype.kind not in "biuUS":
        raise ConfigError(
            f"{path}: array 'client' must hold a name or whole number for each example, [N], not "
            f"{owners.dtype} {list(owners.shape)}"
        )
    return [
        v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in owners.tolist()
    ]


def _rows(path: str, arrays: dict[str, np.ndarray], name: str, kinds: str = "biuf") -> np.ndarray:
    if name not in arrays:
        raise ConfigError(f"{path} has no array {name!r}; it has {', '.join(arrays) or 'none'}")
    array = arrays[name]
    if array.dtype.kind not in kinds:
        raise ConfigError(f"{path}: array {name!r} must hold numbers, not {array.dtype}")
    if array.ndim == 0 or len(array) == 0 or array[0].size == 0:
        raise ConfigError(
            f"{path}: array {name!r} must have a row for each example, not {list(array.shape)}"
        )
    return array


def _same_rows(path: str, **sizes: int) -> None:
    (first, n), *others = sizes.items()
    for name, other in others:
        if other != n:
            raise ConfigError(f"{path}: {n} rows in {first} but {other} in {name}")
