"""Checkpoints: written whole or not at all, and read without running any code."""

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.types import ConfigError

FORMAT = "fedtorch checkpoint 3"

SUM = "sum"
"""In a file: over all else that is in it, so that what was edited is not gone on from."""


def save(folder: Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``round-N.pt`` atomically and drop all but the last ``keep``.

    The file is complete on disk before it gets its name, so that a crash or a power cut leaves the
    previous checkpoint as the newest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{state['round']:06d}.pt"
    # client memory was never noised and may be a client's own model: for nobody else's eyes
    write(path, FORMAT, state, private=bool(state.get("privacy") or state.get("memory")))
    for old in everything(folder)[:-keep]:
        old.unlink()
    return path


def saved(
    before: int | None, round: int, write: Callable[[], object], tell: Callable[[str], object]
) -> int | None:
    """Save a round once, and return the newest that is saved. A full disk is told, and training goes on."""
    if round == before:
        return before
    try:
        write()
    except (OSError, RuntimeError) as e:  # torch turns a full disk into a RuntimeError
        tell(getattr(e, "strerror", None) or str(e).partition("\n")[0])
        return before
    return round


def everything(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; raises PermissionError where there may be some."""
    try:
        names = os.listdir(folder)  # a glob takes a closed folder for an empty one
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(folder / n for n in names if re.fullmatch(r"round-\d+\.pt", n))


def load(folder: Path) -> dict[str, Any]:
    """The newest checkpoint that is whole; raises ConfigError when there is none."""
    return newest(folder)[0]


def newest(folder: Path) -> tuple[dict[str, Any], list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, and each newer one that is not with a sentence about it.

    Raises ConfigError when there is none.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(everything(folder)):
        try:
            return read(path, FORMAT), damaged
        except ConfigError as e:
            damaged.append((path, f"checkpoint {e}"))
    if not damaged:
        raise ConfigError(f"nothing to resume: {folder} holds no checkpoint; leave out --resume")
    more = f", nor is any of the {len(damaged) - 1} before it" if damaged[1:] else ""
    raise ConfigError(
        f"{damaged[0][1]}{more}: nothing is left to go on from; begin anew in another --run-dir"
    )


def write(path: Path, format: str, state: Mapping[str, Any], private: bool = False) -> None:
    """A table of tensors and plain values, whole or not at all; ``read`` gives it back."""
    with disk.whole(path, private=private) as file:
        torch.save({"format": format, SUM: _sum(state), **state}, file)


def read(path: Path, format: str) -> dict[str, Any]:
    """A table of tensors and plain values; raises ConfigError when the file is damaged or another's.

    And PermissionError where it may not be read.
    """
    try:
        # the zip's own checksums, which torch.load does not look at
        with zipfile.ZipFile(disk.regular(path)) as archive:
            if archive.testzip() is not None:
                raise ValueError("its checksum does not match")
        # weights_only: tensors and plain values alone; a foreign pickle cannot run code here
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, dict) or state.pop("format", None) != format:
            raise ValueError(f"it is not of the format {format!r}")
        if state.pop(SUM, None) != _sum(state):
            raise ValueError("what is in it was edited")
    except PermissionError:  # it may be whole, and a private round done again costs again
        raise
    except Exception as e:  # zip, pickle and torch each have errors of their own for damaged files
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        kind = format.removeprefix("fedtorch ").rstrip(" 0123456789")
        raise ConfigError(f"{path} is corrupt or not a {kind} ({first})") from e
    return state


def _sum(value: Any, before: int = 0) -> int:
    """CRC-32 of a table, a list, a tensor or a plain value, after what was ``before``."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            before = _sum(inner, _sum(name, before))
        value = len(value)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            before = _sum(inner, before)
        value = len(value)
    elif isinstance(value, Tensor) and value.layout == torch.strided:
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        before = zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy().data, before)
        value = (value.dtype, value.shape)
    elif isinstance(value, (set, frozenset)):
        value = sorted(map(repr, value))
    return zlib.crc32(repr(value).encode(), before)
