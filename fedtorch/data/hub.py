"""Data from elsewhere: Hugging Face ``datasets`` by name, or a function of the user's own."""

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtorch import seeds
from fedtorch.data.base import Data, Preparation, from_tensors
from fedtorch.data.content import split
from fedtorch.data.images import inputs
from fedtorch.data.pictures import as_array
from fedtorch.data.targets import Targets, understood
from fedtorch.data.tokens import reachable
from fedtorch.options import SHARE, check, find
from fedtorch.types import ConfigError

DECODED = 1024
"""Rows that are decoded at once."""


@dataclass(frozen=True)
class HuggingFace:
    """A dataset of the Hugging Face hub, or a local folder it can load (extra ``hf``)."""

    path: str = ""
    """Name on the hub (``ylecun/mnist``), a local folder, or one that ``save_to_disk`` wrote."""
    _: KW_ONLY
    config: str = ""
    """Configuration of the dataset, where it has several."""
    x: str = "image"
    """Column with the input: images, or lists of numbers."""
    y: str = "label"
    """Column with the class."""
    client: str = ""
    """Column that names each row's owner; empty: none."""
    test_fraction: float = 0.2
    """Share kept for the test where the dataset has no test split."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing."""
        check(self, "dataset", test_fraction=SHARE)

    def load(self, seed: int) -> Data:
        """X [N, ...] (images [N, channels, rows, columns] in 0..1), y [N]."""
        found = fetched(self.path, self.config)
        if "train" not in found:
            raise ConfigError(f"{self.path} has no part 'train'; it has {', '.join(found)}")
        train = found["train"]
        for column in filter(None, (self.x, self.y, self.client)):
            if column not in train.column_names:
                raise ConfigError(
                    f"{self.path} has no column {column!r}; it has {', '.join(train.column_names)}"
                )
        x, done = self._inputs(train)
        keys = [str(k) for k in train[self.client]] if self.client else None
        if "test" in found:
            x_test, other = self._inputs(found["test"])
            if other.scale != done.scale:
                raise ConfigError(
                    f"{self.path}: its test images are not of the kind of its training images: save "
                    "both alike"
                )
            y = self._classes([train, found["test"]])
            test = x_test, y.y[len(x) :]
            target = y.y[: len(x)]
        else:
            y = self._classes([train])
            target = y.y
            keep, held = split((x, target, *([keys] if keys else [])), self.test_fraction, seed)
            test = x[held], target[held]
            keys = [keys[i] for i in keep.tolist()] if keys else None
            x, target = x[keep], target[keep]
        done = replace(done, classes=y.classes, notes=(*done.notes, *y.notes))
        name = self.path.rstrip("/").split("/")[-1]
        return from_tensors(name, (x, target), test, "classification", y.outputs, keys, done)

    def _classes(self, tables: Sequence[Any]) -> Targets:
        """Labels of all parts: numbers, with the names that the dataset has for them, or names."""
        where = f"{self.path}: column {self.y!r}"
        labels = [v for rows in tables for v in rows[self.y]]
        names = tuple(getattr(tables[0].features[self.y], "names", None) or ())
        if any(v is None or (names and v < 0) for v in labels):
            raise ConfigError(f"{where} has examples without a class; leave them out first")
        if any(isinstance(v, (list, dict)) for v in labels):
            raise ConfigError(f"{where} must hold a class for each example, not lists")
        labels = [names[v] for v in labels] if names else labels
        return understood(where, np.array(labels), "classification", names)

    def _inputs(self, rows: Any) -> tuple[torch.Tensor, Preparation]:
        try:
            # a part at a time: decoded pictures take more room than their numbers
            x = np.concatenate(
                [
                    np.stack([_array(v) for v in rows[k : k + DECODED][self.x]])
                    for k in range(0, len(rows), DECODED)
                ]
                or [np.empty(0)]
            )
        except (TypeError, ValueError) as e:
            raise ConfigError(
                f"{self.path}: column {self.x!r} must hold images or lists of numbers, all of one "
                f"size ({e})"
            ) from e
        if x.dtype.kind not in "biuf" or not x.size:
            raise ConfigError(
                f"{self.path}: column {self.x!r} must hold images or lists of numbers, not {x.dtype}"
            )
        images = x.ndim > 2 and x.dtype.name in ("uint8", "uint16")
        given, done = inputs(self.path, x, None if images else 1.0, x.ndim == 4 if images else None)
        return given.float(), done


def fetched(path: str, config: str) -> Any:
    """The parts of a dataset by their names; raises ConfigError where it cannot be had."""
    if not path:
        raise ConfigError("dataset.path: which dataset, by its name on the hub or its folder?")
    away = not Path(path).exists() and not reachable()
    if away:  # read once, as datasets is imported: what was fetched before is there
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import datasets
    except ImportError as e:
        raise ConfigError(
            "dataset hf needs the package datasets: pip install 'fedtorch[hf]'"
        ) from e
    try:
        if not saved(path):
            return datasets.load_dataset(path, config or None)
        found = datasets.load_from_disk(path)
        return found if isinstance(found, dict) else {"train": found}
    except Exception as e:
        why = " ".join(str(e).split())
        hint = ", and its hub does not answer (is this machine online?)" if away else ""
        raise ConfigError(f"Hugging Face dataset {path!r} cannot be loaded: {why}{hint}") from e


def saved(path: str) -> bool:
    """Whether this folder is what ``save_to_disk`` of a dataset, or of a dict of them, wrote."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _array(value: Any) -> np.ndarray:
    """One input; an image by its colours: a palette's numbers are no brightness."""
    picture = isinstance(getattr(value, "mode", None), str) and hasattr(value, "convert")
    return as_array(value) if picture else np.asarray(value)


@dataclass(frozen=True)
class Custom:
    """A function of yours, ``package.module:function``, that returns a ``fedtorch.data.Data``.

    It is called with the global generators of torch, NumPy and Python seeded: a run that goes on, and
    ``fedtorch eval``, see the same data.
    """

    path: str = ""
    """Where it is."""

    def load(self, seed: int) -> Data:
        """Call it; raises ConfigError when it is not there or returns something else."""
        # what the function draws, and its module while it is imported, is the run's seed's to decide
        with seeds.seeded(seeds.derive(seed, "data")):
            make = find(self.path)
            if isinstance(make, type) or not callable(make):
                raise ConfigError(
                    f"dataset.path {self.path!r} must name a function that returns the data"
                )
            try:
                data = make()
            except Exception as e:
                raise ConfigError(f"{self.path} failed: {type(e).__name__}: {e}") from e
        if not isinstance(data, Data):
            raise ConfigError(
                f"{self.path} must return fedtorch.data.Data, not {type(data).__name__}: "
                "fedtorch.data.base.from_tensors(name, (x, y), (x_test, y_test), kind, outputs) makes it"
            )
        return data
