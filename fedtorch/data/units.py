"""Whether numbers to predict from are written in the units of those that a model was trained on.

Nobody can see the unit of a number, but bytes and shares of 1 give themselves away: a model trained on
0.2 answers to 51 without complaint, and wrongly.
"""

from pathlib import Path

import numpy as np

from fedtorch.data.base import Preparation
from fedtorch.types import ConfigError

SHARES = "fractions of 0 to 1"
WHOLE = "whole numbers"
FRACTIONS = "fractions"

LARGEST = {"bool": 1.0, "uint8": 255.0, "uint16": 65535.0}
"""Types of pixels, which are divided by their largest value."""


def look(array: np.ndarray) -> str:
    """The kind of these numbers; empty if they are only 0 and 1, which go with any kind."""
    if not array.size:
        return ""
    inside = float(array.min()) >= 0 and float(array.max()) <= 1
    if array.dtype.kind in "biu" or bool((array == np.floor(array)).all()):
        return "" if inside else WHOLE
    return SHARES if inside else FRACTIONS


def same(path: Path, array: np.ndarray, done: Preparation) -> None:
    """Raises ConfigError where finite numbers are of another kind than those of training, ``done``."""
    now, kind = look(array), array.dtype.name
    was = WHOLE if _integers(done.dtype) else done.numbers
    apart = {(SHARES, WHOLE), (WHOLE, SHARES)}
    if _integers(done.dtype):  # columns that held whole numbers by chance may hold others later
        apart.add((WHOLE, FRACTIONS))
    if _integers(kind) and not _integers(done.dtype):
        apart.add((FRACTIONS, WHOLE))
    if done.scale == 1 and (was, now) in apart:
        raise ConfigError(
            f"{path} holds {now} (up to {float(array.max()):g}), but the model was trained on "
            f"{was}: give them as the training data were"
        )
    most = LARGEST.get(done.dtype)
    if done.scale == 1 or most is None:
        return
    if kind in LARGEST and kind != done.dtype:
        raise ConfigError(
            f"{path} holds {kind}, but the model was trained on {done.dtype} divided by {done.scale:g}: "
            "give them as the training data were"
        )
    high = most if _integers(kind) else most / done.scale
    if not (float(array.min()) >= 0 and float(array.max()) <= high):
        raise ConfigError(
            f"{path} holds numbers beyond 0 to {high:g}: the model trained on {done.dtype} divided by "
            f"{done.scale:g}; save them as they are, or divided"
        )


def _integers(dtype: str) -> bool:
    return dtype.startswith(("bool", "int", "uint"))
