"""MNIST-style IDX files: MNIST, Fashion-MNIST, KMNIST, and EMNIST as it is downloaded."""

import gzip
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from glob import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.data.base import Data, Preparation, from_tensors
from fedtorch.data.content import split
from fedtorch.options import SHARE, check
from fedtorch.types import ConfigError


class Pair(NamedTuple):
    """Images [N, rows, columns], their labels [N], and what the files' names begin with."""

    x: Tensor
    y: Tensor
    prefix: str


@dataclass(frozen=True)
class Idx:
    """A folder of MNIST-style IDX files (MNIST, Fashion-MNIST, EMNIST, KMNIST), gzipped or not.

    With ``train-*`` and ``t10k-*`` the files' own split is used; with one pair alone about
    ``test_fraction`` of its images are the test set, each by its content. EMNIST is read as downloaded:
    its images, which lie on their side, are turned upright, and its ``-mapping.txt`` names the classes.
    """

    path: str = ""
    """Folder with ...-images-idx3-ubyte and ...-labels-idx1-ubyte."""
    _: KW_ONLY
    subset: str = ""
    """Which of several data sets in the folder, by what its files begin with: emnist-letters."""
    turn: bool | None = None
    """Exchange rows and columns; none: of files called emnist, which lie on their side."""
    classes: list[str] = field(default_factory=list)
    """Labels, or their names, in the order of outputs; none: those of a mapping file, or as numbered."""
    test_fraction: float = 0.2
    """Share kept for the test where only one pair of files is there."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing."""
        check(self, "dataset", test_fraction=SHARE)

    def load(self, seed: int) -> Data:
        """X [N, 1, rows, columns] in 0..1, y [N] as numbered in the files, from 0 where they begin at 1."""
        folder = Path(self.path)
        if not self.path or not folder.is_dir():
            raise ConfigError(f"dataset.path must be a folder with IDX files, got {self.path!r}")
        pairs = {
            p: found for p in ("train", "t10k", "test") if (found := _pair(folder, p, self.subset))
        }
        if len(pairs) == 3:
            raise ConfigError(f"{folder} has both t10k and test files: which are the test set?")
        if not pairs or (len(pairs) == 2 and "train" not in pairs):
            which = f" that begin with {self.subset!r}" if self.subset else ""
            raise ConfigError(
                f"no IDX files{which} in {self.path!r}: expected e.g. train-images-idx3-ubyte.gz and "
                "train-labels-idx1-ubyte.gz"
            )
        prefix = next(iter(pairs.values())).prefix.rstrip("-_.")
        names = _mapping(folder / f"{prefix}-mapping.txt")
        order, notes = self._order(
            torch.cat([p.y for p in pairs.values()]).unique().tolist(), names
        )
        turn = "emnist" in prefix.lower() if self.turn is None else self.turn
        if turn:
            notes = ["rows and columns are exchanged: images of EMNIST lie on their side", *notes]
        sets = [_prepared(p, order, turn) for p in pairs.values()]  # training first
        if len(sets) == 2:
            train, test = sets
        else:
            (x, y) = sets[0]
            keep, held = split((x, y), self.test_fraction, seed)
            train, test = (x[keep], y[keep]), (x[held], y[held])
        called = tuple(names.get(k, k) for k in order)
        plain = called == tuple(range(len(order)))
        done = Preparation(
            classes=() if plain else called,
            scale=255,
            pixels=True,
            dtype="uint8",
            notes=tuple(notes),
        )
        name = (self.subset or folder.name or "idx").rstrip("-_.")
        return from_tensors(name, train, test, "classification", len(order), preparation=done)

    def _order(self, there: list[int], names: Mapping[int, str]) -> tuple[list[int], list[str]]:
        """Labels in the order of the outputs, and what is to be said about them."""
        known = {str(k): k for k in (*there, *names)} | {name: k for k, name in names.items()}
        order, notes = [*names], []
        if self.classes:
            if unknown := [c for c in self.classes if c not in known and not c.isdigit()]:
                raise ConfigError(
                    f"dataset.classes must hold labels of the files, such as {there[0]}, not {unknown[0]!r}"
                )
            order = [known[c] if c in known else int(c) for c in self.classes]
        elif not names and there == list(range(1, len(there) + 1)):
            order, notes = there, ["labels count from 1, outputs from 0"]
        elif not names:
            order = list(range(there[-1] + 1))
        if missing := sorted({*there} - {*order}):
            raise ConfigError(
                f"{self.path}: the labels hold {missing[0]}, which "
                f"{'dataset.classes' if self.classes else 'the mapping file'} does not name"
            )
        return order, notes


def _prepared(pair: Pair, order: list[int], turn: bool) -> tuple[Tensor, Tensor]:
    place = torch.zeros(max(order) + 1, dtype=torch.int64)
    place[order] = torch.arange(len(order))
    x = pair.x.transpose(1, 2).contiguous() if turn else pair.x
    return x.float().div_(255).unsqueeze(1), place[pair.y.long()]


def _mapping(path: Path) -> dict[int, str]:
    """Label -> character: lines of a label and the character's codes, as EMNIST has them."""
    if not path.is_file():
        return {}
    try:
        lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        names = {int(label): chr(int(code)) for label, code, *_ in filter(None, lines)}
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} must hold lines of a label and a character's code: {e}") from e
    return names if len({*names.values()}) == len(names) else {}


def _pair(folder: Path, prefix: str, subset: str) -> Pair | None:
    images, labels = (
        sorted(
            p
            for p in folder.glob(f"{escape(subset)}*{prefix}-{what}*")
            if p.suffix in (".gz", "", f".{end}") and re.search(rf"(^|[-_.]){prefix}-", p.name)
        )
        for what, end in (("images", "idx3-ubyte"), ("labels", "idx1-ubyte"))
    )
    if not images and not labels:
        return None
    if not images or not labels:
        raise ConfigError(f"{folder}: {prefix} needs both an images and a labels file")
    sets = {p.name.rpartition(f"{prefix}-")[0] for p in (*images, *labels)}
    if len(sets) > 1:
        raise ConfigError(
            f"{folder} holds several data sets: choose one by --dataset.subset "
            f"{' or '.join(sorted(s.rstrip('-_.') for s in sets if s))}, or give each a folder of its own"
        )
    x, y = read_idx(images[0]), read_idx(labels[0])
    if x.dim() != 3 or y.dim() != 1 or not x.numel():
        raise ConfigError(
            f"{images[0]} must hold images [N, rows, columns] and {labels[0].name} a label for each, "
            f"[N], not {list(x.shape)} and {list(y.shape)}"
        )
    if len(x) != len(y):
        raise ConfigError(f"{images[0]} has {len(x)} images but {labels[0]} {len(y)} labels")
    return Pair(x, y, sets.pop())


def read_idx(path: Path) -> Tensor:
    """One IDX file as a uint8 tensor; raises ConfigError when it is cut short or something else."""
    try:
        raw = disk.regular(path).read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, OSError, zlib.error) as e:
        raise ConfigError(f"{path} cannot be read ({e}); it may be cut short") from e
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ConfigError(f"{path} is not an IDX file of unsigned bytes")
    dims = raw[3]
    if len(raw) < 4 + 4 * dims:
        raise ConfigError(f"{path} is cut short within its header")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if len(body) != math.prod(shape):
        raise ConfigError(
            f"{path} is cut short or damaged: {shape} needs {math.prod(shape)} bytes, "
            f"there are {len(body)}"
        )
    return torch.from_numpy(body.reshape(shape).copy())
