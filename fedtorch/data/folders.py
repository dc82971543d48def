"""Folders of pictures, each class in one of its own, as torchvision's ``ImageFolder`` has them."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.data import pictures
from fedtorch.data.base import Data, Preparation, facts_of
from fedtorch.data.content import split
from fedtorch.data.pictures import Decoded, Frame
from fedtorch.options import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, check
from fedtorch.training.batches import Collated
from fedtorch.types import ConfigError

PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev"),
}
"""Names of folders that say what their pictures are for, in small letters."""

LEVELS = ("part", "client", "class")


class File(NamedTuple):
    """A picture and the folders it lies in, outermost first."""

    path: str
    folders: tuple[str, ...]


@dataclass(frozen=True)
class ImageFolder:
    """A folder of pictures, each class in a folder of its own: CLASS/1.png, or train/CLASS/1.png.

    Every picture is decoded once before training, so that a damaged one is named. Those that fit in
    ``memory`` are kept, others are read again each time.
    """

    path: str = ""
    """The folder."""
    _: KW_ONLY
    levels: str = ""
    """What the folders are, outermost first: class, client/class, class/client, part/class (train and
    test), part/client/class, ...; none: class or part/class."""
    size: int | None = None
    """Side of the square that is cut out of the middle; none: pictures are of one size already."""
    resize: int | None = None
    """Length that the shorter side gets before; none: as size."""
    colour: Literal["auto", "grey", "rgb"] = "auto"
    """Channels; auto: grey where all pictures are, else rgb."""
    background: str = ""
    """Colour behind what is see-through, white or #rrggbb; none: such pictures are refused."""
    scale: float | None = None
    """Divisor of pixels; none: 255, and 65535 of 16 bits."""
    classes: list[str] = field(default_factory=list)
    """Class folders in the order of the outputs, where sites must agree; none: sorted."""
    test_fraction: float = 0.2
    """Share kept for the test where no folder holds it, each picture by its content; 0: none."""
    memory: int = 256
    """MiB of pictures, as numbers, that are kept in memory; of more each is read when it is needed."""
    workers: int = 0
    """Processes that read ahead for a client that trains, where pictures are not kept."""

    def __post_init__(self) -> None:
        """Refuse what no picture can become."""
        ranges = {"size": COUNT, "resize": COUNT, "scale": POSITIVE, "memory": NOT_NEGATIVE}
        ranges["workers"] = NOT_NEGATIVE
        check(self, "dataset", test_fraction=SHARE, **ranges)
        if self.resize and (not self.size or self.resize < self.size):
            raise ConfigError(
                "dataset.resize must be at least dataset.size, which is cut out of it"
            )

    def load(self, seed: int) -> Data:
        """X [N, channels, rows, columns] in 0..1, y [N] by class folder; keys are client folders."""
        root = Path(self.path)
        if not self.path or not root.is_dir():
            raise ConfigError(f"dataset.path must be a folder of pictures, got {self.path!r}")
        files, others = found(root)
        # what each level of folders is, and whose each picture is
        levels = self._levels(root, files)
        place = {what: levels.index(what) for what in levels}
        notes = [f"folders are {'/'.join(levels)}", *others]
        files, tests = self._parts(files, place.get("part"), notes)
        owners = [f.folders[place["client"]] for f in files] if "client" in place else None
        # classes as numbers
        names = self.classes or by_number({f.folders[place["class"]] for f in (*files, *tests)})
        number = {name: k for k, name in enumerate(names)}
        for f in (*files, *tests):
            if f.folders[place["class"]] not in number:
                raise ConfigError(f"{f.path}: dataset.classes does not name its class folder")
        y, y_test = (
            torch.tensor([number[f.folders[place["class"]]] for f in part], dtype=torch.int64)
            for part in (files, tests)
        )
        # pictures as tensors of one size
        frame, deep, said = self._frame([*files, *tests])
        scale = self.scale or (65535.0 if deep else 255.0)
        seen = Decoded([f.path for f in (*files, *tests)], frame, deep, self.memory << 20)
        if scale < seen.most:
            raise ConfigError(f"dataset.scale {scale:g}: pixels go up to {seen.most}")
        if deep and not self.scale and 0 < seen.most <= 4095:
            said.append("no pixel is above 4095: of 12 bits? Then give --dataset.scale 4095")
        # training and test rows, by the folders or by chance
        every = torch.cat([y, y_test])
        keep = torch.arange(len(files))
        held = torch.arange(len(files), len(every))
        if not len(tests):
            rows: list[Sequence[str] | Tensor] = [seen.digests, y, *([owners] if owners else [])]
            keep, held = split(rows, self.test_fraction, seed)
        train, test = (seen.dataset(index, every, scale) for index in (keep, held))
        if self.workers and not seen.kept:
            train = Collated(train, num_workers=self.workers)
        # what was done, for whoever uses the model later
        kept = "kept in memory" if seen.kept else "read from their files each time"
        done = Preparation(
            classes=() if names == [str(k) for k in range(len(names))] else tuple(names),
            scale=scale,
            pixels=True,
            dtype="uint16" if deep else "uint8",
            resize=frame.resize,
            background=self.background,
            notes=(*notes, *said, f"{len(every)} pictures, {kept}"),
        )
        shape = (frame.channels, frame.rows, frame.columns)
        keys = [owners[i] for i in keep.tolist()] if owners else None
        facts = facts_of(shape, len(names), "classification")
        return Data(
            root.resolve().name,
            train,
            test,
            "classification",
            len(names),
            every[keep],
            keys,
            facts,
            done,
        )

    def _levels(self, root: Path, files: Sequence[File]) -> tuple[str, ...]:
        """What each level of folders is; asked for where it could be more than one thing."""
        deep = {len(f.folders): f for f in reversed(files)}
        if len(deep) > 1:
            few, many = (deep[k].path for k in (min(deep), max(deep)))
            raise ConfigError(
                f"pictures lie at different depths, {few} and {many}: put all as many folders deep"
            )
        depth = next(iter(deep))
        levels = tuple(filter(None, self.levels.lower().split("/")))
        if self.levels:
            if "class" not in levels or {*levels} - {*LEVELS} or len({*levels}) < len(levels):
                raise ConfigError(
                    f"dataset.levels must be made of part, client and class, as client/class, not "
                    f"{self.levels!r}"
                )
            if len(levels) != depth:
                raise ConfigError(
                    f"dataset.levels {self.levels} are {len(levels)} folders, but {files[0].path} lies in "
                    f"{depth}"
                )
            return levels
        parts = [k for k in range(depth) if all(part_of(f.folders[k]) for f in files)]
        if depth - len(parts) == 1 and len(parts) < 2:
            return tuple("part" if k in parts else "class" for k in range(depth))
        if depth - len(parts) < 1:
            raise ConfigError(
                f"{files[0].path}: pictures must lie in a folder for each class, as {root}/cat/1.png or "
                f"{root}/train/cat/1.png"
            )
        raise ConfigError(
            f"{files[0].path} lies in {depth} folders: say what they are, as --dataset.levels "
            f"{'part/' if parts == [0] else ''}client/class or "
            f"{'part/' if parts == [0] else ''}class/client"
        )

    def _parts(
        self, files: list[File], level: int | None, notes: list[str]
    ) -> tuple[list[File], list[File]]:
        """Pictures to train on and to test on; without a folder for the test there are none of those."""
        if level is None:
            return files, []
        sets: dict[str, list[File]] = {}
        for f in files:
            part = part_of(f.folders[level])
            if not part:
                raise ConfigError(f"{f.path}: {f.folders[level]!r} is neither train nor test")
            sets.setdefault(part, []).append(f)
        if "train" not in sets:
            raise ConfigError(f"{self.path} has no folder train; it has {', '.join(sets)}")
        test = sets.get("test", sets.get("validation", []))
        if "validation" in sets:
            left = "left out: the test is test" if "test" in sets else "the test"
            notes.append(f"the validation folder is {left}")
        return sets["train"], test

    def _frame(self, files: Sequence[File]) -> tuple[Frame, bool, list[str]]:
        """What all pictures become, whether they have 16 bits, and what is to be said."""
        looks = pictures.looks([f.path for f in files])
        grey = {"auto": not any(k.colour for k in looks), "grey": True, "rgb": False}[self.colour]
        deep = [k.deep for k in looks]
        if any(deep) and not (all(deep) and grey):
            others = [f.path for f, is_deep in zip(files, deep, strict=True) if not is_deep]
            why = f"and {others[0]} has not" if others else "and dataset.colour is rgb"
            raise ConfigError(
                f"{files[deep.index(True)].path} has 16 bits of grey, {why}: save all as 16-bit grey, or "
                "all as 8-bit"
            )
        sizes = Counter((k.rows, k.columns) for k in looks)
        if self.size is None and len(sizes) > 1:
            shown = ", ".join(f"{r} x {c}" for r, c in islice(sizes, 3))
            raise ConfigError(
                f"pictures are of {len(sizes)} sizes ({shown}, ...): give --dataset.size 64, the side of "
                "the square that is cut out of their middle"
            )
        rows, columns = next(iter(sizes)) if self.size is None else (self.size, self.size)
        resize = (self.resize or self.size) if self.size else None
        notes = Counter(part for k in looks for part in k.note.split(", ") if part)
        said = [f"{what} ({n})" for what, n in notes.items()]
        if mixed := sum(not k.colour for k in looks) if not grey else sum(k.colour for k in looks):
            said.append(
                f"{mixed} {'coloured ones are made grey' if grey else 'grey ones get colours'}"
            )
        if resize:
            said.append(f"shorter side {resize}, the middle {rows} x {columns}")
            if small := sum(min(k.rows, k.columns) < resize for k in looks):
                said.append(f"{small} smaller ones are enlarged")
        return Frame(1 if grey else 3, rows, columns, resize or 0, self.background), any(deep), said


def found(root: Path) -> tuple[list[File], list[str]]:
    """All pictures below a folder, by name, and what is to be said of other files."""
    files, others = [], []
    for folder, below, names in disk.below(root):
        below[:] = sorted(n for n in below if not n.startswith((".", "__MACOSX")))
        at = Path(folder).relative_to(root).parts
        if len(at) > len(LEVELS):
            raise ConfigError(f"{folder} lies more than {len(LEVELS)} folders deep")
        for name in sorted(n for n in names if not n.startswith(".")):
            if name.lower().endswith(pictures.ENDINGS):
                files.append(File(os.path.join(folder, name), at))
            else:
                others.append(name)
    if not files:
        ends = ", ".join(pictures.ENDINGS)
        there = ", ".join(sorted({Path(name).suffix or name for name in others})[:5])
        raise ConfigError(
            f"there are no pictures in {root} ({ends})" + (f"; it has {there}" if there else "")
        )
    said = f"{len(others)} files are no pictures ({', '.join(others[:3])}{', ...' * (len(others) > 3)})"
    return files, [said] if others else []


def by_number(names: set[str]) -> list[str]:
    """Names in order; numbers by their size."""
    numbers = all(n.isascii() and n.isdigit() for n in names)
    return sorted(names, key=(lambda n: (int(n), n)) if numbers else None)


def part_of(folder: str) -> str | None:
    """What a folder of this name is for: train, test or validation."""
    return next((part for part, names in PARTS.items() if folder.lower() in names), None)
