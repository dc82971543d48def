"""Files that a trained model is given: prepared as its training data were."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.data import labelled, pictures, separated, units
from fedtorch.data.assembly import unlabelled
from fedtorch.data.base import Preparation
from fedtorch.data.pictures import Frame
from fedtorch.data.prepared import Prepared
from fedtorch.types import ConfigError


def examples(known: Prepared, path: Path) -> Tensor:
    """The file's examples as the model takes them, [N, ...]; raises ConfigError where they cannot be."""
    if known.preparation.columns:
        if path.suffix.lower() in (".npy", ".npz", *pictures.ENDINGS):
            raise ConfigError(f"{path}: this run takes a table, .csv, .tsv or .parquet")
        return unlabelled(path, known.preparation)
    shape = tuple(known.facts.get("input_shape", ()))
    if known.preparation.vocabulary:
        return encoded_texts(path, known.preparation, shape[0])
    if not shape:
        raise ConfigError(f"{path}: the model takes inputs of its own kind, which no file holds")
    if path.suffix.lower() in pictures.ENDINGS:
        return torch.tensor(picture(path, shape, known)).view(1, *shape)
    return arranged(path, array(path), shape, known)


def array(path: Path) -> np.ndarray:
    """What NumPy has written there; raises ConfigError where it has not."""
    if path.suffix not in (".npy", ".npz"):
        raise ConfigError(
            f"{path}: this run takes .npy, .npz (array x), images .png, .jpg, .bmp, or a folder of them"
        )
    try:
        found = np.load(disk.regular(path), allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found as archive:
            return np.asarray(archive["x"])
    except (OSError, ValueError, KeyError, EOFError) as e:
        why = getattr(e, "strerror", None) or e
        if "pickle" in str(e):  # what NumPy says of any file that it does not know
            why = "it is no array of numbers, as np.save(path, x) writes it"
        raise ConfigError(f"{path} cannot be read: {why}") from e


def encoded_texts(path: Path, done: Preparation, length: int) -> Tensor:
    """Texts of a table's column, or the lines of another file, as numbers of the vocabulary."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return labelled.encoded(labelled.texts(separated.read(path), done.text), done, length)
    try:
        lines = disk.regular(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read as text: {e}") from e
    if not any(map(str.strip, lines)):
        raise ConfigError(f"{path} holds no text")
    return labelled.encoded([line for line in lines if line.strip()], done, length)


def pictures_in(folder: Path) -> list[Path]:
    """Every picture of a folder and below, by name."""
    every = (Path(at, name) for at, _, names in disk.below(folder) for name in names)
    files = sorted(p for p in every if p.suffix.lower() in pictures.ENDINGS and p.name[0] != ".")
    if not files:
        raise ConfigError(f"there are no pictures in {folder} ({', '.join(pictures.ENDINGS)})")
    return files


def arranged(path: Path, array: np.ndarray, shape: tuple[int, ...], known: Prepared) -> Tensor:
    """Numbers scaled and laid out as in training, [N, ...]."""
    if array.dtype.kind not in "biuf":
        raise ConfigError(f"{path} must hold numbers, not {array.dtype}")
    done = known.preparation
    if done.channels_last and array.ndim in (3, 4) and array.shape[-3:] != shape:
        array = np.moveaxis(array, -1, -3)
    codes = (done.dtype or array.dtype.name) == "int64"  # such as a vocabulary's
    x = torch.from_numpy(np.ascontiguousarray(array.astype(np.float32)))
    if x.numel() == 0 or not _ends(x.shape, shape):
        raise ConfigError(
            f"{path} holds {list(x.shape)}; the model takes examples of {list(shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise ConfigError(f"{path} has NaN or infinite values; fill or drop those examples first")
    units.same(path, array, done)
    x = torch.from_numpy(np.ascontiguousarray(array.astype(np.int64))) if codes else x
    if done.scale != 1:
        x = _scaled(path, x.float(), array.dtype.kind in "iu", done.scale, done.pixels)
    elif done.pixels and float(x.max()) > (1 if array.dtype.kind in "iu" else 2):
        raise ConfigError(
            f"{path} holds numbers up to {float(x.max()):g}, but the model was trained on images in 0 to "
            "1: divide them as the training images were"
        )
    return x.reshape(-1, *shape)


def _ends(found: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether the last axes are an example's; the one channel of grey images may be left out."""
    plain = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    return any(tuple(found[-len(s) :]) == tuple(s) for s in (shape, plain))


def _scaled(path: Path, x: Tensor, whole: bool, scale: float, pixels: bool) -> Tensor:
    """Whole numbers divided as in training; fractions are taken to be divided already."""
    x = x / scale if whole else x
    if not whole:
        print(
            f"note: {path} holds fractions, taken as divided by {scale:g} already", file=sys.stderr
        )
    if pixels and x.numel() and not (float(x.min()) >= 0 and float(x.max()) <= 1):
        raise ConfigError(
            f"{path} holds numbers beyond {f'0 to {scale:g}' if whole else '0 to 1'}: the model trained "
            f"on whole numbers of 0 to {scale:g} divided by {scale:g}; save them as they are, or divided"
        )
    return x


def picture(path: Path, shape: tuple[int, ...], known: Prepared) -> np.ndarray:
    """An image as the model takes it, in 0..1; light on dark, as the training data."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"{path}: the model takes {list(shape)}, which is no image")
    done = known.preparation
    if not done.pixels:
        raise ConfigError(
            f"{path}: the model was not trained on images in 0..1, so that a picture cannot be scaled for "
            "it: give the array it takes as .npy"
        )
    seen = pictures.looks([str(path)])[0]
    if not done.resize and (seen.rows, seen.columns) != shape[1:]:
        print(
            f"note: {path} has {seen.rows} x {seen.columns} pixels and is stretched to the "
            f"{shape[1]} x {shape[2]} of training",
            file=sys.stderr,
        )
    array = pictures.read(path, Frame(*shape, resize=done.resize, background=done.background))
    largest = 65535 if array.dtype == np.uint16 else 255
    by = done.scale if array.dtype.name == done.dtype else largest
    return array.astype(np.float32) / np.float32(by)
