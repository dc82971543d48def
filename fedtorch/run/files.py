"""The folder of a run: what it is made of, and what it leaves behind."""

import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import tomli_w
from torch import nn

from fedtorch import disk, saved
from fedtorch.run import checkpoint, versions
from fedtorch.saved import SafetensorError
from fedtorch.saved import savable as savable
from fedtorch.types import ConfigError

PACKAGES = ("fedtorch", "torch", "numpy", "numba", "tensorboard", "safetensors")

MODEL = "model.safetensors"

LEDGER = "ledger.jsonl"
"""What the privacy budget was spent on: written before anything is released."""

SUMS = "SHA256SUMS"

SUMMED = (
    "config.toml",
    "metrics.jsonl",
    MODEL,
    "summary.json",
    "privacy.json",
    "report.json",
    LEDGER,
)
"""Files that must stay what they are once a run has ended."""


def create(folder: Path) -> None:
    """Make the folder; raises ConfigError when another run is in it or it cannot be made."""
    try:
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:  # ValueError: a path with a zero byte
        raise unwritable(folder, e) from e


def try_out(folder: Path) -> None:
    """Make room for checkpoints and write a byte there; raises ConfigError when that fails."""
    try:
        (folder / "checkpoints").mkdir(exist_ok=True)
    except OSError as e:
        raise unwritable(folder, e) from e
    disk.try_out(folder / "checkpoints")


def unwritable(folder: Path, error: Exception) -> ConfigError:
    """The one sentence about a folder that takes nothing."""
    if isinstance(error, ConfigError):
        return error
    return ConfigError(
        f"run folder {folder} cannot be written: {getattr(error, 'strerror', None) or error}"
    )


def check_free(folder: Path) -> None:
    """Raises ConfigError when the folder holds a run, or TensorBoard files of somebody else."""
    others = [p for p in folder.glob("*tfevents*") if not p.name.endswith(disk.EVENTS)]
    if others:
        raise ConfigError(
            f"{folder} holds TensorBoard files that are not of a run ({others[0].name}): choose "
            "another --run-dir"
        )
    # a config without a checkpoint is a run killed before it began: there is nothing to lose
    if checkpoint.everything(folder / "checkpoints") or any(folder.glob("events.out.tfevents.*")):
        raise ConfigError(
            f"{folder} already holds a run: --resume continues it, or choose another --run-dir"
        )


def write_config(folder: Path, table: dict[str, Any]) -> str:
    """The resolved config, as ``--config`` reads it, and what it ran with; returns the config's text."""
    text = tomli_w.dumps(table)
    disk.replace(folder / "config.toml", text)
    about = {
        "command": sys.argv,
        "git_commit": versions.git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "packages": {p: versions.installed(p) for p in PACKAGES},
    }
    disk.replace(folder / "about.json", json.dumps(about, indent=2) + "\n")
    return text


def write_model(folder: Path, model: nn.Module, command: str = "train") -> None:
    """The trained model as a plain state_dict, to be written before anything is reported.

    ``command`` is the one that goes on with the run.

    Raises ConfigError when it cannot be written: the run is not lost while it has a checkpoint.
    """
    try:
        saved.write(folder / MODEL, model)
    except (OSError, SafetensorError) as e:
        raise ConfigError(
            f"the trained model cannot be written to {folder} ({getattr(e, 'strerror', None) or e}): "
            f"make room, then fedtorch {command} --run-dir {folder} --resume"
        ) from e


def write_json(path: Path, table: dict[str, Any]) -> None:
    """A table as a JSON file; JSON has no NaN: a figure that overflowed is null."""
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in table.items()
    }
    disk.replace(path, json.dumps(plain, indent=2) + "\n")


def read_model(folder: Path, model: nn.Module, command: str = "train") -> None:
    """Load a run's trained weights; raises ConfigError when they are missing, damaged or do not fit."""
    path = folder / MODEL
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no trained model yet: fedtorch {command} --run-dir {folder} --resume"
        )
    saved.read(path, model)


def write_sums(folder: Path) -> None:
    """``SHA256SUMS`` of what a finished run leaves, as ``sha256sum --check`` reads it."""
    there = [n for n in SUMMED if (folder / n).is_file()]
    disk.replace(folder / SUMS, "".join(f"{_sum(folder / n)}  {n}\n" for n in there))


def changed(folder: Path) -> list[str]:
    """A sentence for each file that is not what the finished run wrote; none while there are no sums.

    The model is not among them: whoever reads it checks it by the digest it carries.
    """
    path = folder / SUMS
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    known = {n: s for s, _, n in (line.partition("  ") for line in lines) if n in SUMMED}
    return [
        f"{folder / name} is not what the run wrote: damaged or edited"
        for name, was in known.items()
        if name != MODEL and not ((folder / name).is_file() and _sum(folder / name) == was)
    ]


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
