"""Checkpoints: written whole or not at all, and read without running any code."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from fedtorch import disk
from fedtorch.types import ConfigError

FORMAT = "fedtorch checkpoint 1"


def save(folder: Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``round-N.pt`` atomically and drop all but the last ``keep``.

    The file is complete on disk before it gets its name, so that a crash or a power cut leaves the
    previous checkpoint as the newest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{state['round']:06d}.pt"
    # client memory in a private run's was never noised: for nobody else's eyes
    with disk.whole(path, private=bool(state.get("privacy"))) as file:
        torch.save({"format": FORMAT, **state}, file)
    for old in everything(folder)[:-keep]:
        old.unlink()
    return path


def everything(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(p for p in folder.glob("round-*.pt") if re.fullmatch(r"round-\d+\.pt", p.name))


def load(folder: Path) -> dict[str, Any]:
    """The newest checkpoint; raises ConfigError when there is none or it cannot be trusted."""
    found = everything(folder)
    if not found:
        raise ConfigError(f"nothing to resume: {folder} holds no checkpoint; leave out --resume")
    path = found[-1]
    try:
        # the zip's own checksums, which torch.load does not look at
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("its checksum does not match")
        # weights_only: tensors and plain values alone; a foreign pickle cannot run code here
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as e:  # zip, pickle and torch each have errors of their own for damaged files
        first = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ConfigError(
            f"checkpoint {path} is corrupt or not a checkpoint ({first}); delete it to go on from "
            "the one before"
        ) from e
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise ConfigError(f"{path} is not a fedtorch checkpoint")
    return state
