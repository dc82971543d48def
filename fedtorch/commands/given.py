"""Files that a trained model is given: prepared as its training data were."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch.data import units
from fedtorch.data.prepared import Prepared
from fedtorch.data.tables import unlabelled
from fedtorch.types import ConfigError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")


def examples(known: Prepared, path: Path) -> Tensor:
    """The file's examples as the model takes them, [N, ...]; raises ConfigError where they cannot be."""
    if known.preparation.columns:
        return unlabelled(path, known.preparation)
    shape = tuple(known.facts.get("input_shape", ()))
    if not shape:
        raise ConfigError(f"{path}: the model takes inputs of its own kind, which no file holds")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                array = archive["x"]
        elif path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix.lower() in PICTURES:
            return torch.tensor(picture(path, shape, known)).view(1, *shape)
        else:
            raise ConfigError(
                f"{path}: this run takes .npy, .npz (array x), or images .png, .jpg, .bmp"
            )
    except (OSError, ValueError, KeyError, EOFError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from e
    return arranged(path, array, shape, known)


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
    """An image scaled to what the model takes, in 0..1; light on dark, as the training data."""
    from PIL import Image

    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"{path}: the model takes {list(shape)}, which is no image")
    if not known.preparation.pixels:
        raise ConfigError(
            f"{path}: the model was not trained on images in 0..1, so that a picture cannot be scaled for "
            "it: give the array it takes as .npy"
        )
    with Image.open(path) as image:
        if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema() != (255, 255):
                raise ConfigError(
                    f"{path} is see-through in places: flatten it onto a background first"
                )
        if image.mode.startswith("I") or image.mode == "F":
            return _deep(path, image, shape)
        # a palette's numbers are no brightness: its colours are
        plain = image.convert("RGB") if image.mode in ("P", "PA") else image
        sized = plain.convert("L" if shape[0] == 1 else "RGB").resize((shape[2], shape[1]))
    array = np.asarray(sized, np.float32) / 255
    return array[None] if shape[0] == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _deep(path: Path, image: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A 16-bit image, which Pillow would cut off at 255."""
    from PIL import Image

    array = np.asarray(image).astype(np.float32)
    if image.mode == "F" or array.min() < 0 or array.max() > 65535 or shape[0] != 1:
        raise ConfigError(
            f"{path} is an image of kind {image.mode!r}, which has no largest value here: save it as 8-bit "
            "or 16-bit grey, or 8-bit colour"
        )
    sized = Image.fromarray(array / 65535).resize((shape[2], shape[1]))
    return np.asarray(sized, np.float32)[None]
