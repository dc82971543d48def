"""The kind of target: classes, yes or no, or amounts. Asked for where the values could be either.

By themselves, names, true and false, -1 and 1, and the whole numbers 0, 1, ..., n - 1 are classes, and
fractions are amounts. Any other whole numbers (1 to 5 may be a rating) are asked for by --dataset.kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch.data.base import Data, Preparation, from_tensors
from fedtorch.training.losses import IGNORED
from fedtorch.types import ConfigError

MOST_CLASSES = 100
"""Whole-numbered targets with at most this many values, 0 to n - 1, are classes by themselves."""

KINDS = ("classification", "binary", "regression")


@dataclass(frozen=True)
class Targets:
    """Targets as tensors, and what their classes are called."""

    kind: str
    y: Tensor
    """[N] or [N, ...]: int64 classes, or float32."""
    outputs: int
    classes: tuple[Any, ...] = ()
    """Names in the order of the outputs; none: their numbers."""
    notes: tuple[str, ...] = ()


def understood(where: str, values: np.ndarray, kind: str, names: Sequence[str] = ()) -> Targets:
    """Targets from numbers, truth values or names, [N] or [N, ...]; ``names`` fixes the classes' order.

    Raises ConfigError where the values do not fit the kind, or ``auto`` would have to guess.
    """
    if kind not in ("auto", *KINDS):
        raise ConfigError(
            f"dataset.kind must be auto, {', '.join(KINDS[:2])} or regression, not {kind!r}"
        )
    if names and kind == "regression":
        raise ConfigError(
            "dataset.classes names classes, but dataset.kind is regression: leave out one of them"
        )
    notes: tuple[str, ...] = ()
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ConfigError(f"{where} has NaN or infinite values; fill or drop those rows first")
    if values.ndim == 2 and values.shape[1] == 1 and kind != "regression":
        values, notes = values[:, 0], ("targets [N, 1] are read as [N]",)
    if values.ndim == 2 and kind in ("auto", "classification") and _one_hot(values):
        values, notes = values.argmax(1), ("one-hot targets are read as classes",)
    if values.ndim > 1:
        return _many(where, values, kind)
    found = _one(where, values, kind, tuple(names))
    return Targets(found.kind, found.y, found.outputs, found.classes, (*notes, *found.notes))


def from_targets(
    name: str,
    x: Tensor,
    y: Targets,
    keys: Sequence[str] | None,
    parts: tuple[Tensor, Tensor],
    done: Preparation,
) -> Data:
    """Data of inputs and targets; ``parts``: which examples train, and which are the central test."""
    if not bool(torch.isfinite(x.double()).all()):
        raise ConfigError(f"{name} has NaN or infinite values; fill or drop those rows first")
    train, test = parts
    owners = [keys[i] for i in train.tolist()] if keys else None
    facts = {"num_outputs": y.outputs, "out_features": y.outputs} if y.kind == "binary" else {}
    return from_tensors(
        name, (x[train], y.y[train]), (x[test], y.y[test]), y.kind, y.outputs, owners, done, **facts
    )


def _one(where: str, values: np.ndarray, kind: str, names: tuple[str, ...]) -> Targets:
    if kind == "regression" and values.dtype.kind in "biuf":
        return Targets("regression", _floats(values), 1)
    if kind == "regression":
        raise ConfigError(f"{where}: a regression target must hold numbers, not {_few(values)}")
    there = np.unique(values)
    numbers = values.dtype.kind in "iuf"
    whole = numbers and bool((there == np.round(there)).all())
    if names:
        return _by_name(where, values, kind, names)
    if kind == "auto" and numbers and not whole:
        return Targets("regression", _floats(values), 1)
    if kind == "auto" and numbers:
        _surely_classes(where, there)
    if kind == "binary":
        return _binary(where, values, there)
    if (numbers and not whole) or IGNORED in there.tolist():
        raise ConfigError(
            f"{where}: class labels must be 0, 1, ... or other whole numbers or names, but the target has "
            f"{_few(there)}; leave out rows without a label"
        )
    if kind == "auto" and not numbers and len(there) > 10 and 2 * len(there) > len(values):
        raise ConfigError(
            f"{where}: the target has {len(there)} different names in {len(values)} rows, too many for "
            "classes: choose another --dataset.target, or give --dataset.kind classification"
        )
    y = torch.from_numpy(np.searchsorted(there, values)).long()
    if numbers and np.array_equal(there, np.arange(len(there))):
        return Targets("classification", y, len(there))
    return Targets("classification", y, len(there), _as_python(there), (_mapping(there),))


def _surely_classes(where: str, there: np.ndarray) -> None:
    counting = len(there) <= MOST_CLASSES and np.array_equal(there, np.arange(len(there)))
    if not counting and there.tolist() != [-1, 1]:
        raise ConfigError(
            f"{where}: the target holds the whole numbers {_few(there)}, which may be classes or amounts: "
            "give --dataset.kind classification or --dataset.kind regression"
        )


def _binary(where: str, values: np.ndarray, there: np.ndarray) -> Targets:
    if set(there.tolist()) <= {0, 1} and there.dtype.kind in "iuf":
        return Targets("binary", _floats(values), 1)
    if len(there) != 2 or (there.dtype.kind in "iuf" and there.tolist() != [-1, 1]):
        raise ConfigError(
            f"{where}: a binary target must be 0 or 1, -1 or 1, or two names, not {_few(there)}"
        )
    y = torch.from_numpy((values == there[1]).astype(np.float32))
    return Targets("binary", y, 1, _as_python(there), (_mapping(there),))


def _by_name(where: str, values: np.ndarray, kind: str, names: tuple[str, ...]) -> Targets:
    if len(set(names)) < len(names) or len(names) < 2:
        raise ConfigError(
            f"dataset.classes must name two classes or more, each once, not {_few(names)}"
        )
    if values.dtype.kind == "f" and not (values == np.round(values)).all():
        raise ConfigError(
            f"{where}: dataset.classes names classes, but the target holds {_few(values)}: leave it "
            "out, or name another target"
        )
    number = {name: k for k, name in enumerate(names)}
    written = [str(v) for v in _as_python(values)]
    if unknown := sorted({w for w in written if w not in number}):
        raise ConfigError(
            f"{where}: the target has {_few(unknown)}, which dataset.classes does not name ({_few(names)})"
        )
    y = torch.tensor([number[w] for w in written])
    if kind == "binary" and len(names) != 2:
        raise ConfigError(
            f"a binary target has two classes, but dataset.classes names {len(names)}: name two, or give "
            "dataset.kind classification"
        )
    plain = () if names == tuple(map(str, range(len(names)))) else names
    if kind == "binary":
        return Targets("binary", y.float(), 1, plain)
    return Targets("classification", y, len(names), plain)


def _many(where: str, values: np.ndarray, kind: str) -> Targets:
    """Several targets to an example: amounts, yes or no for each, or a class for each position."""
    if values.dtype.kind not in "biuf":
        raise ConfigError(
            f"{where}: several targets to an example must be numbers, not {_few(values)}"
        )
    whole = bool((values == np.round(values)).all())
    outputs = values[0].size
    if kind == "auto" and whole:
        sizes = ", ".join(map(str, values.shape[1:]))
        raise ConfigError(
            f"{where}: the targets [N, {sizes}] are whole numbers: give --dataset.kind "
            "classification (a class for each position), binary (yes or no for each) or regression"
        )
    if kind == "binary" and not set(np.unique(values).tolist()) <= {0, 1}:
        raise ConfigError(f"{where}: a binary target must be 0 or 1, not {_few(np.unique(values))}")
    if kind == "classification":
        kept = values[values != IGNORED]
        if not whole or not len(kept) or kept.min() < 0:
            raise ConfigError(
                f"{where}: class labels must be 0, 1, ... (or {IGNORED}, ignored), but the target has "
                f"{_few(np.unique(values))}"
            )
        return Targets(
            "classification", torch.from_numpy(values.astype(np.int64)), int(kept.max()) + 1
        )
    return Targets("regression" if kind == "auto" else kind, _floats(values), outputs)


def _one_hot(values: np.ndarray) -> bool:
    if values.dtype.kind not in "biuf" or values.shape[1] < 2:
        return False
    return bool(((values == 0) | (values == 1)).all() and (values.sum(1) == 1).all())


def _floats(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _as_python(values: np.ndarray) -> tuple[Any, ...]:
    if values.dtype.kind in "iuf":
        return tuple(int(v) for v in values)
    return tuple(values.tolist())


def _mapping(there: np.ndarray) -> str:
    names = _as_python(there)
    shown = ", ".join(f"{str(n)[:20]} is {k}" for k, n in enumerate(names[:5]))
    return f"classes are numbered in order: {shown}{', ...' if len(names) > 5 else ''}"


def _few(values: Any) -> str:
    some = [v.item() if hasattr(v, "item") else v for v in np.asarray(values).ravel()[:5]]
    return ", ".join(f"{v:g}" if isinstance(v, float) else repr(v) for v in some) + (
        ", ..." if np.size(values) > 5 else ""
    )
