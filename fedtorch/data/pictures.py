"""Pictures in files, through Pillow: what they are, and their pixels laid out for a model."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedtorch import disk
from fedtorch.types import ConfigError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
"""Endings of files that hold pictures."""

READERS = min(8, os.cpu_count() or 1)
"""Threads that decode pictures before training."""

TRANSLATED = ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV")
"""Kinds of colour that become red, green and blue."""

UPRIGHT = 274
"""EXIF's number of how a camera was held; 1 is upright."""


class Look(NamedTuple):
    """What a file's first bytes say of its picture."""

    rows: int
    columns: int
    colour: bool
    deep: bool
    """16 bits for each pixel."""
    note: str
    """What is done to it beside sizing, in words."""


@dataclass(frozen=True)
class Frame:
    """What a picture becomes: [channels, rows, columns]."""

    channels: int
    rows: int
    columns: int
    resize: int = 0
    """Its shorter side becomes so long, and the middle is cut out; 0: one of another size is stretched."""
    background: str = ""
    """Colour behind what is see-through; empty: such a picture is refused."""


def looks(paths: Sequence[str]) -> list[Look]:
    """Size and kind of each, without its pixels; raises ConfigError where a file holds no picture."""
    with ThreadPoolExecutor(READERS) as pool:
        return [*pool.map(_look, paths)]


def _look(path: str) -> Look:
    with _opened(path) as image:
        columns, rows = image.size
        turned, grey_palette = _exif(path, image).get(UPRIGHT, 1), _grey_palette(image)
        if turned in (5, 6, 7, 8):
            rows, columns = columns, rows
        deep = _deep(image)
        notes = {
            "turned upright by its EXIF tag": turned in range(2, 9),
            "16-bit colour is read in 8 bits": not deep and "16" in str(image.tile),
            f"{image.mode} is read as colours": image.mode in TRANSLATED and not grey_palette,
        }
        note = ", ".join(k for k, here in notes.items() if here)
        grey = deep or image.mode in ("1", "L", "LA", "La") or grey_palette
        return Look(rows, columns, not grey, deep, note)


def read(path: str | Path, frame: Frame) -> np.ndarray:
    """Pixels [channels, rows, columns], uint8, or uint16 of a 16-bit picture; raises ConfigError.

    A picture that is damaged, or see-through without a background, is named.
    """
    from PIL import Image, ImageOps

    with _opened(path) as image:
        side = frame.resize or max(frame.rows, frame.columns)
        # a JPEG need not be decoded in full to be made small
        image.draft(None, (2 * side, 2 * side))
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
        except Exception as e:  # Pillow's readers raise whatever they stumble over
            raise ConfigError(f"{path} is damaged: {e}") from e
        if _deep(image):
            return _sixteen(path, image, frame)
        mode = "L" if frame.channels == 1 else "RGB"
        try:
            image = _flat(path, image, frame.background)
            image = image if image.mode == mode else image.convert(mode)
        except ConfigError:  # a ValueError, which says all already
            raise
        except ValueError as e:
            raise ConfigError(f"{path} is an image of kind {image.mode!r}: {e}") from e
        sized = _sized(image, frame, Image.Resampling.BICUBIC)
    array = np.asarray(sized)
    return array[None] if frame.channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


class Decoded:
    """Pictures decoded once: a digest of each, their largest pixel, and all of them where they fit."""

    def __init__(self, paths: Sequence[str], frame: Frame, deep: bool, room: int) -> None:
        """``room``: bytes that they may take as float32. Raises ConfigError that names a damaged one."""
        self.paths, self.frame = paths, frame
        shape = (len(paths), frame.channels, frame.rows, frame.columns)
        self.kept = 4 * int(np.prod(shape, dtype=np.int64)) <= room
        self.pixels = np.empty(shape if self.kept else 0, np.uint16 if deep else np.uint8)

        def see(k: int) -> tuple[str, int]:
            array = read(paths[k], frame)
            if self.kept:
                self.pixels[k] = array
            return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest(), int(array.max())

        with ThreadPoolExecutor(READERS) as pool:
            found = [*pool.map(see, range(len(paths)))]
        self.digests = [d for d, _ in found]
        self.most = max((m for _, m in found), default=0)

    def dataset(self, index: Tensor, y: Tensor, scale: float) -> Dataset:
        """Some of them as tensors, or as files."""
        if self.kept:
            x = torch.from_numpy(self.pixels[index.numpy()].astype(np.float32)) / scale
            return TensorDataset(x, y[index])
        return Pictures([self.paths[i] for i in index.tolist()], y[index], self.frame, scale)


class Pictures(Dataset[Any]):
    """Pictures that are read from their files when they are asked for: (x float32 [C, H, W], y)."""

    def __init__(self, paths: Sequence[str], y: Tensor, frame: Frame, scale: float) -> None:
        """One class for each path."""
        self.paths, self.y, self.frame, self.scale = paths, y, frame, scale

    def __len__(self) -> int:
        """How many."""
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """One picture and its class."""
        array = read(self.paths[i], self.frame)
        return torch.from_numpy(array.astype(np.float32)) / self.scale, self.y[i]


def as_array(value: Any) -> np.ndarray:
    """A picture that is open already, by its colours: [rows, columns] or [rows, columns, 3]."""
    if _deep(value):
        return _grey16(value)
    if value.mode not in ("L", "RGB"):
        value = value.convert("L" if value.mode == "1" else "RGB")
    return np.asarray(value)


def _opened(path: str | Path) -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise ConfigError("pictures need the package pillow: pip install pillow") from e
    try:
        image: Any = Image.open(disk.regular(Path(path)))
    except (
        Exception
    ) as e:  # no such file, no picture, one of a size that is meant to fill the memory
        why = disk.reason(e) if isinstance(e, OSError) and e.strerror else e
        raise ConfigError(f"{path} cannot be read as a picture: {why}") from e
    # a phone keeps a preview in the same file, which is no picture of its own
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        image.close()
        raise ConfigError(f"{path} holds {image.n_frames} pictures: give each a file of its own")
    return image


def _exif(path: str, image: Any) -> Any:
    try:
        return image.getexif()
    except Exception as e:
        raise ConfigError(f"{path} is damaged: {e}") from e


def _deep(image: Any) -> bool:
    return bool(image.mode.startswith("I") or image.mode == "F")


def _grey16(image: Any) -> np.ndarray:
    """The numbers of 16-bit grey, which Pillow may hold in 32."""
    array = np.asarray(image)
    if image.mode == "F" or array.min() < 0 or array.max() > 65535:
        raise ValueError(f"an image of kind {image.mode!r} goes beyond 16 bits")
    return array.astype(np.uint16)


def _sixteen(path: str | Path, image: Any, frame: Frame) -> np.ndarray:
    """Grey in full, which Pillow would cut off at 255."""
    from PIL import Image

    try:
        array = _grey16(image)
        if frame.channels != 1:
            raise ValueError("it is grey, and the model takes colours")
    except ValueError as e:
        raise ConfigError(
            f"{path} is an image of kind {image.mode!r}, which has no largest value here ({e}): save it as "
            "8-bit or 16-bit grey, or 8-bit colour"
        ) from e
    image = Image.fromarray(array.astype(np.float32))
    sized = np.asarray(_sized(image, frame, Image.Resampling.BICUBIC))
    return sized.round().clip(0, 65535).astype(np.uint16)[None]


def _flat(path: str | Path, image: Any, background: str) -> Any:
    """Without transparency: whatever is see-through shows the background."""
    from PIL import Image

    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        full = image.convert("RGBA")
        if full.getchannel("A").getextrema() == (255, 255):
            return full.convert("L" if image.mode in ("LA", "La", "L") else "RGB")
        if not background:
            raise ConfigError(
                f"{path} is see-through in places: flatten it onto a background first (a folder to train "
                "on takes --dataset.background white, or another colour)"
            )
        return Image.alpha_composite(Image.new("RGBA", full.size, background), full).convert("RGB")
    # a palette's numbers are no brightness: its colours are
    return image.convert("RGB") if image.mode == "P" else image


def _grey_palette(image: Any) -> bool:
    if image.mode != "P" or image.palette is None:
        return False
    palette = np.frombuffer(bytes(image.palette.getdata()[1]), np.uint8)
    wide = palette[: len(palette) // 3 * 3].reshape(-1, 3)
    return image.palette.mode == "RGB" and bool((wide == wide[:, :1]).all())


def _sized(image: Any, frame: Frame, how: Any) -> Any:
    rows, columns = frame.rows, frame.columns
    if frame.resize:
        share = frame.resize / min(image.size)
        size = tuple(max(round(n * share), frame.resize) for n in image.size)
        image = image if size == image.size else image.resize(size, how)
        left, top = (size[0] - columns) // 2, (size[1] - rows) // 2
        return image.crop((left, top, left + columns, top + rows))
    return image if image.size == (columns, rows) else image.resize((columns, rows), how)
