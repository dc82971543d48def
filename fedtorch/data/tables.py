"""Tables: CSV and NPZ files, with an optional column that names each row's client."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtorch.data.base import Data, from_tensors
from fedtorch.data.content import split
from fedtorch.options import SHARE, check
from fedtorch.types import ConfigError

MOST_CLASSES = 100
"""Whole-numbered targets with at most this many values, 0 to n - 1, are classes."""


@dataclass(frozen=True)
class Csv:
    """A CSV file with a header; every column but the client's must be a number in every row."""

    path: str = ""
    """The file."""
    _: KW_ONLY
    target: str = ""
    """Column to predict; empty: the last one."""
    client: str = ""
    """Column that names each row's owner; empty: none."""
    kind: str = "auto"
    """classification, binary, regression, or auto: classes when the target is 0, 1, 2, ..."""
    standardize: bool = False
    """Scale features by the training rows' mean and standard deviation (seen by the server)."""
    test_fraction: float = 0.2
    """Share of rows kept for the central test."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing."""
        check(self, "dataset", test_fraction=SHARE)

    def load(self, seed: int) -> Data:
        """X [N, columns], y [N]."""
        x, y, keys = self._table()
        train, test = split(_columns(x, y, keys), self.test_fraction, seed)
        if self.standardize:
            mean, std = x[train].mean(0), x[train].std(0)
            x = (x - mean) / torch.where(std > 0, std, 1)
        return _data(Path(self.path).stem, self.kind, x, y, keys, train, test)

    def _table(self) -> tuple[Tensor, Tensor, list[str] | None]:
        header, rows = _read(Path(self.path))
        target = self.target or header[-1]
        for role, column in (("target", target), ("client", self.client)):
            if column and column not in header:
                raise ConfigError(
                    f"{self.path} has no {role} column {column!r}; it has {', '.join(header)}"
                )
        names = self.features(header)
        if not names:
            raise ConfigError(f"{self.path} has no feature columns beside {target!r}")
        x = torch.tensor(_numbers(self.path, header, rows, names), dtype=torch.float32)
        y = torch.tensor(_numbers(self.path, header, rows, [target]), dtype=torch.float64)[:, 0]
        return x, y, [row[header.index(self.client)] for _, row in rows] if self.client else None

    def features(self, header: Sequence[str]) -> list[str]:
        """The columns that are neither target nor client."""
        return [h for h in header if h not in (self.target or header[-1], self.client)]

    def unlabelled(self, path: Path, seed: int) -> Tensor:
        """Features of another file with these columns, scaled as ``load`` scales: [N, columns]."""
        header, _ = _read(Path(self.path))
        names, (other, more) = self.features(header), _read(path)
        if missing := [n for n in names if n not in other]:
            raise ConfigError(
                f"{path} has no column {missing[0]!r}, which the model was trained on"
            )
        x = torch.tensor(_numbers(str(path), other, more, names), dtype=torch.float32)
        if self.standardize:
            seen, y, keys = self._table()
            seen = seen[split(_columns(seen, y, keys), self.test_fraction, seed)[0]]
            x = (x - seen.mean(0)) / torch.where(seen.std(0) > 0, seen.std(0), 1)
        return x


@dataclass(frozen=True)
class Npz:
    """A NumPy archive with arrays x and y, and optionally client, x_test and y_test."""

    path: str = ""
    """The file."""
    _: KW_ONLY
    kind: str = "auto"
    """classification, binary, regression, or auto: classes when y is 0, 1, 2, ..."""
    test_fraction: float = 0.2
    """Share kept for the central test where there is no x_test."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing."""
        check(self, "dataset", test_fraction=SHARE)

    def load(self, seed: int) -> Data:
        """X [N, ...] as float32 (integers of a vocabulary stay integers), y [N]."""
        arrays = _arrays(self.path)
        x, y = _inputs(self.path, arrays, "x"), _targets(self.path, arrays, "y")
        keys = [str(k) for k in arrays["client"]] if "client" in arrays else None
        _same_rows(self.path, x=len(x), y=len(y), client=len(keys) if keys else len(x))
        if "x_test" in arrays:
            x_test = _inputs(self.path, arrays, "x_test")
            y_test = _targets(self.path, arrays, "y_test")
            _same_rows(self.path, x_test=len(x_test), y_test=len(y_test))
            if x_test.shape[1:] != x.shape[1:] or y_test.shape[1:] != y.shape[1:]:
                raise ConfigError(f"{self.path}: x_test and y_test must have the shape of x and y")
            train, test = torch.arange(len(x)), torch.arange(len(x), len(x) + len(x_test))
            x, y = torch.cat([x, x_test]), torch.cat([y, y_test])
        else:
            train, test = split(_columns(x, y, keys), self.test_fraction, seed)
        return _data(Path(self.path).stem, self.kind, x, y, keys, train, test)


def _data(
    name: str,
    kind: str,
    x: Tensor,
    y: Tensor,
    keys: list[str] | None,
    train: Tensor,
    test: Tensor,
) -> Data:
    if not (bool(torch.isfinite(x.double()).all()) and bool(torch.isfinite(y).all())):
        raise ConfigError(f"{name} has NaN or infinite values; fill or drop those rows first")
    values = y.unique()
    classes = len(values)
    counting = y.dim() == 1 and bool((values == torch.arange(classes)).all())
    if kind == "auto":
        kind = "classification" if counting and classes <= MOST_CLASSES else "regression"
    if kind not in ("classification", "binary", "regression"):
        raise ConfigError(
            f"dataset.kind must be auto, classification, binary or regression, not {kind!r}"
        )
    if kind == "classification" and not counting:
        raise ConfigError(
            f"{name}: class labels must be 0, 1, ..., but the target has {values[:5].tolist()} ..."
        )
    if kind == "binary" and not set(values.tolist()) <= {0.0, 1.0}:
        raise ConfigError(f"{name}: a binary target must be 0 or 1, not {values[:5].tolist()} ...")
    y = y.long() if kind == "classification" else y.float()
    outputs = classes if kind == "classification" else y[0].numel()
    owners = [keys[i] for i in train.tolist()] if keys else None
    return from_tensors(name, (x[train], y[train]), (x[test], y[test]), kind, outputs, owners)


def _columns(x: Tensor, y: Tensor, keys: list[str] | None) -> list[Tensor | Sequence[str]]:
    return [x, y, keys] if keys else [x, y]


Rows = list[tuple[int, list[str]]]
"""Line of the file, and its values."""


def _read(path: Path) -> tuple[list[str], Rows]:
    try:
        # utf-8-sig: spreadsheets write a byte order mark that would be part of the first name
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            table = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"dataset.path must be a CSV file: {e}") from e
    if not table:
        raise ConfigError(f"{path} is empty")
    (_, header), *rows = table
    twice = [h for h, n in Counter(header).items() if n > 1]
    if twice:
        raise ConfigError(f"{path} names column {twice[0]!r} twice")
    if not rows:
        raise ConfigError(f"{path} has a header but no rows")
    for line, row in rows:
        if len(row) != len(header):
            raise ConfigError(
                f"{path}, line {line}: {len(row)} values, but the header names {len(header)}; "
                "the file may be cut short"
            )
    return header, rows


def _numbers(path: str, header: list[str], rows: Rows, columns: list[str]) -> list[list[float]]:
    at = [header.index(c) for c in columns]
    table = []
    for line, row in rows:
        try:
            table.append([float(row[j]) for j in at])
        except ValueError:
            bad = next(c for c, j in zip(columns, at, strict=True) if not _is_number(row[j]))
            raise ConfigError(
                f"{path}, line {line}: column {bad!r} holds {row[header.index(bad)]!r}, not a "
                "number; encode or drop it, or name it as dataset.client"
            ) from None
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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


def _inputs(path: str, arrays: dict[str, np.ndarray], name: str) -> Tensor:
    array = _rows(path, arrays, name)
    return torch.from_numpy(array if array.dtype == np.int64 else array.astype(np.float32))


def _targets(path: str, arrays: dict[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(_rows(path, arrays, name).astype(np.float64))


def _rows(path: str, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in arrays:
        raise ConfigError(f"{path} has no array {name!r}; it has {', '.join(arrays) or 'none'}")
    array = arrays[name]
    if array.dtype.kind not in "biuf":
        raise ConfigError(f"{path}: array {name!r} must hold numbers, not {array.dtype}")
    if array.ndim == 0 or len(array) == 0:
        raise ConfigError(f"{path}: array {name!r} must have a row for each example")
    return array


def _same_rows(path: str, **sizes: int) -> None:
    (first, n), *others = sizes.items()
    for name, other in others:
        if other != n:
            raise ConfigError(f"{path}: {n} rows in {first} but {other} in {name}")
