"""Tables: CSV and NPZ files, with an optional column that names each row's client."""

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtorch.data.base import Data, from_tensors, split
from fedtorch.types import ConfigError

MOST_CLASSES = 100
"""Whole-numbered targets with at most this many values, 0 to n - 1, are classes."""


@dataclass(frozen=True)
class Csv:
    """A CSV file with a header; every column but the client's must be a number in every row."""

    path: str = ""
    """The file."""
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

    def load(self, seed: int) -> Data:
        """X [N, columns], y [N]."""
        header, rows = _read(Path(self.path))
        target = self.target or header[-1]
        for role, column in (("target", target), ("client", self.client)):
            if column and column not in header:
                raise ConfigError(
                    f"{self.path} has no {role} column {column!r}; it has {', '.join(header)}"
                )
        features = [h for h in header if h not in (target, self.client)]
        if not features:
            raise ConfigError(f"{self.path} has no feature columns beside {target!r}")
        x = torch.tensor(_numbers(self.path, header, rows, features), dtype=torch.float32)
        y = torch.tensor(_numbers(self.path, header, rows, [target]), dtype=torch.float64)[:, 0]
        keys = [r[header.index(self.client)] for r in rows] if self.client else None
        train, test = split(len(y), self.test_fraction, seed)
        if self.standardize:
            mean, std = x[train].mean(0), x[train].std(0)
            x = (x - mean) / torch.where(std > 0, std, 1)
        return _data(Path(self.path).stem, self.kind, x, y, keys, train, test)


@dataclass(frozen=True)
class Npz:
    """A NumPy archive with arrays x and y, and optionally client, x_test and y_test."""

    path: str = ""
    """The file."""
    kind: str = "auto"
    """classification, binary, regression, or auto: classes when y is 0, 1, 2, ..."""
    test_fraction: float = 0.2
    """Share kept for the central test where there is no x_test."""

    def load(self, seed: int) -> Data:
        """X [N, ...] as float32 (integers of a vocabulary stay integers), y [N]."""
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                arrays = {k: archive[k] for k in archive.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
            raise ConfigError(f"{self.path} cannot be read as an NPZ file: {e}") from e
        for name in ("x", "y"):
            if name not in arrays:
                raise ConfigError(
                    f"{self.path} has no array {name!r}; it has {', '.join(arrays) or 'none'}"
                )
        x, y = _tensor(arrays["x"]), torch.from_numpy(arrays["y"].astype(np.float64))
        keys = [str(k) for k in arrays["client"]] if "client" in arrays else None
        for name, n in (("y", len(y)), ("client", len(keys) if keys else len(x))):
            if n != len(x):
                raise ConfigError(f"{self.path}: {len(x)} rows in x but {n} in {name}")
        if "x_test" in arrays and "y_test" in arrays:
            train, test = torch.arange(len(x)), torch.arange(len(x), len(x) + len(arrays["x_test"]))
            x = torch.cat([x, _tensor(arrays["x_test"])])
            y = torch.cat([y, torch.from_numpy(arrays["y_test"].astype(np.float64))])
            keys = keys and keys + [""] * len(test)
        else:
            train, test = split(len(y), self.test_fraction, seed)
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


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = [r for r in csv.reader(file) if r]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"dataset.path must be a CSV file: {e}") from e
    except ValueError as e:
        raise ConfigError(f"{path} is empty") from e
    if not rows:
        raise ConfigError(f"{path} has a header but no rows")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ConfigError(
                f"{path}, row {i + 2}: {len(row)} values, but the header names {len(header)}; "
                "the file may be cut short"
            )
    return header, rows


def _numbers(
    path: str, header: list[str], rows: list[list[str]], columns: list[str]
) -> list[list[float]]:
    at = [header.index(c) for c in columns]
    table = []
    for i, row in enumerate(rows):
        try:
            table.append([float(row[j]) for j in at])
        except ValueError:
            bad = next(c for c, j in zip(columns, at, strict=True) if not _is_number(row[j]))
            raise ConfigError(
                f"{path}, row {i + 2}: column {bad!r} holds {row[header.index(bad)]!r}, not a "
                "number; encode or drop it, or name it as dataset.client"
            ) from None
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.dtype == np.int64 else array.astype(np.float32))
