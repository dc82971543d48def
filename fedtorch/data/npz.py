"""NumPy archives: arrays x and y, and optionally client, x_test and y_test."""

from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from fedtorch import disk
from fedtorch.data.base import Data
from fedtorch.data.content import split
from fedtorch.data.images import inputs
from fedtorch.data.targets import from_targets, understood
from fedtorch.options import POSITIVE, SHARE, check
from fedtorch.types import ConfigError

ARRAYS = ("x", "y", "client", "x_test", "y_test")
"""What is read of an archive."""


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
        x, y = _array(self.path, arrays, "x"), _array(self.path, arrays, "y", "biufUS")
        keys = _owners(self.path, arrays["client"]) if "client" in arrays else None
        _same_rows(self.path, x=len(x), y=len(y), client=len(keys) if keys is not None else len(x))
        own = "x_test" in arrays or "y_test" in arrays
        n = len(x)
        if own:
            x_test, y_test = (
                _array(self.path, arrays, "x_test"),
                _array(self.path, arrays, "y_test", "biufUS"),
            )
            _same_rows(self.path, x_test=len(x_test), y_test=len(y_test))
            if x_test.shape[1:] != x.shape[1:] or y_test.shape[1:] != y.shape[1:]:
                raise ConfigError(f"{self.path}: x_test and y_test must have the shape of x and y")
            if x_test.dtype != x.dtype:
                raise ConfigError(
                    f"{self.path}: x is {x.dtype} but x_test {x_test.dtype}: give one type"
                )
            x, y = np.concatenate([x, x_test]), np.concatenate([y, y_test])
        y = np.char.decode(y, "utf-8") if y.dtype.kind == "S" else y
        given, done = inputs(self.path, x, self.scale, self.channels_last)
        found = understood(self.path, y, self.kind, self.classes)
        if own:
            parts = torch.arange(n), torch.arange(n, len(x))
        else:
            parts = split([given, found.y, *([keys] if keys else [])], self.test_fraction, seed)
        left = ", ".join(k for k in arrays if k not in ARRAYS)
        said = (f"arrays left out: {left}",) if left else ()
        done = replace(done, classes=found.classes, notes=(*done.notes, *found.notes, *said))
        return from_targets(Path(self.path).stem, given, found, keys, parts, done)


def _arrays(path: str) -> dict[str, np.ndarray]:
    if not path:
        raise ConfigError("dataset.path must be an NPZ file, as np.savez(path, x=x, y=y) writes it")
    try:
        # allow_pickle=False: a foreign file must not run code here
        with disk.regular(Path(path)).open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError(
                    "it holds one array without a name; write np.savez(path, x=x, y=y)"
                )
            with archive:
                return {k: archive[k] if k in ARRAYS else np.empty(0) for k in archive.files}
    except Exception as e:  # zip, zlib and NumPy each have errors of their own for damaged files
        if "Object arrays" in str(e):  # which may run code
            raise ConfigError(
                f"{path!r} holds Python objects, as of rows of unequal length: give each array one type "
                "and shape, np.array(rows, dtype='float32')"
            ) from e
        if "pickle" in str(e):
            raise ConfigError(
                f"{path!r} is no NPZ file: write one by np.savez(path, x=x, y=y)"
            ) from e
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


def _array(path: str, arrays: dict[str, np.ndarray], name: str, kinds: str = "biuf") -> np.ndarray:
    if name not in arrays:
        raise ConfigError(
            f"{path} has no array {name!r}; it has {', '.join(arrays) or 'none'}: name them so, "
            "np.savez(path, x=..., y=...)"
        )
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
            raise ConfigError(
                f"{path}: {n} rows in {first} but {other} in {name}: give a row of each"
            )
