"""Image data: scikit-learn's digits (offline, the default), and how arrays of pixels are laid out."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtorch import seeds
from fedtorch.data import units
from fedtorch.data.base import Data, Preparation, from_tensors
from fedtorch.options import SHARE, check
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 (Alpaydin & Kaynak 1998): bundled, offline."""

    test_fraction: float = 0.2
    """Share of the examples kept for the central test."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing."""
        check(self, "dataset", test_fraction=SHARE)

    def load(self, seed: int) -> Data:
        """X [N, 1, 8, 8] in 0..1, y [N] in 0..9."""
        table = _digits()
        x = torch.tensor(table[:, :-1] / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
        y = torch.tensor(table[:, -1], dtype=torch.int64)
        # by a shuffle and not by content: a table that never changes has no neighbours
        order = torch.randperm(len(y), generator=seeds.generator(seed, "test split"))
        size = (
            min(max(1, round(len(y) * self.test_fraction)), len(y) - 1) if self.test_fraction else 0
        )
        train, test = order[size:].sort().values, order[:size].sort().values
        return from_tensors(
            "digits",
            (x[train], y[train]),
            (x[test], y[test]),
            "classification",
            10,
            preparation=Preparation(scale=16, pixels=True),
        )


def _digits() -> np.ndarray:
    # 64 pixels and a label a row. Its table lies in the package: importing scikit-learn takes a second
    found = find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or ():
        if (table := Path(folder, "datasets", "data", "digits.csv.gz")).is_file():
            return np.loadtxt(table, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def inputs(
    where: str, array: np.ndarray, scale: float | None, channels_last: bool | None
) -> tuple[Tensor, Preparation]:
    """Examples [N, ...] as float32, int64 as it is, and what was done to them.

    Bytes and 16-bit numbers of images are divided by their largest value. Raises ConfigError where it
    cannot be told whether numbers are pixels, or which axis holds the channels.
    """
    notes: list[str] = []
    largest = {"uint8": 255.0, "uint16": 65535.0}.get(array.dtype.name)
    if scale is None and largest and array.ndim < 3:
        raise ConfigError(
            f"{where}: x is {array.dtype} {list(array.shape)}: give --dataset.scale {largest:g} where "
            "it holds pixels, --dataset.scale 1 where its numbers are to be taken as they are"
        )
    # channels first
    looks_last = array.ndim == 4 and array.shape[3] in (1, 3, 4) and array.shape[1] not in (1, 3, 4)
    if looks_last and channels_last is None:
        raise ConfigError(
            f"{where}: x {list(array.shape)} seems to hold its channels last, and models take [N, "
            "channels, rows, columns]: give --dataset.channels-last true to turn it round, or false"
        )
    if channels_last and array.ndim != 4:
        raise ConfigError(
            f"{where}: dataset.channels_last needs x of four axes, not {list(array.shape)}"
        )
    if channels_last:
        array = np.moveaxis(array, 3, 1)
        notes.append("channels, which came last, are moved to the front")
    if largest and array.ndim == 3:
        array = array[:, None]
        notes.append("images [N, rows, columns] get an axis for one channel")
    # numbers of usual size
    by = scale or largest or 1.0
    kind = np.int64 if array.dtype == np.int64 else np.float32
    x = torch.from_numpy(np.ascontiguousarray(array.astype(kind)))
    x = x / by if by != 1 else x
    if not bool(torch.isfinite(x).all()):
        raise ConfigError(f"{where} has NaN or infinite values; fill or drop those rows first")
    image = x.dim() > 2 and x.is_floating_point()
    low, high = (float(x.min()), float(x.max())) if image else (0.0, 0.0)
    if image and by == 1 and high > 2:
        notes.append("inputs go beyond 2: pixels are best divided, as by --dataset.scale 255")
    return x, Preparation(
        scale=by,
        pixels=image and low >= 0 and high <= 1,
        channels_last=bool(channels_last),
        dtype=array.dtype.name,
        numbers=units.look(array),
        notes=tuple(notes),
    )
