"""The folder of a run: what it is made of, and what it leaves behind."""

import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import tomli_w
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from fedtorch import checkpoint, disk, versions
from fedtorch.types import ConfigError

PACKAGES = ("fedtorch", "torch", "numpy", "numba", "tensorboard", "safetensors")

MODEL = "model.safetensors"

EVENTS = ".fedtorch"
"""Ends the name of every event file of ours; files of others are never touched."""


def create(folder: Path) -> None:
    """Make the folder; raises ConfigError when another run is in it or it cannot be written."""
    others = [p for p in folder.glob("*tfevents*") if not p.name.endswith(EVENTS)]
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
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise ConfigError(f"run folder {folder} cannot be written: {e.strerror}") from e


def write_config(folder: Path, table: dict[str, Any]) -> None:
    """The resolved config, as ``--config`` reads it, and what it ran with."""
    disk.replace(folder / "config.toml", tomli_w.dumps(table))
    about = {
        "command": sys.argv,
        "git_commit": versions.git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "packages": {p: versions.installed(p) for p in PACKAGES},
    }
    disk.replace(folder / "about.json", json.dumps(about, indent=2) + "\n")


def write_model(folder: Path, model: nn.Module) -> None:
    """The trained model as a plain state_dict, to be written before anything is reported.

    Raises ConfigError when it cannot be written: the run is not lost while it has a checkpoint.
    """
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    try:
        with disk.whole(folder / MODEL) as file:
            file.write(save(state))
    except (OSError, SafetensorError) as e:
        raise ConfigError(
            f"the trained model cannot be written to {folder} ({getattr(e, 'strerror', None) or e}): "
            f"make room, then fedtorch train --run-dir {folder} --resume"
        ) from e


def write_json(path: Path, table: dict[str, Any]) -> None:
    """A table as a JSON file; JSON has no NaN: a figure that overflowed is null."""
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in table.items()
    }
    disk.replace(path, json.dumps(plain, indent=2) + "\n")


def read_model(folder: Path, model: nn.Module) -> None:
    """Load the trained weights of a run; raises ConfigError when they are not there or do not fit."""
    path = folder / MODEL
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no trained model yet: fedtorch train --run-dir {folder} --resume"
        )
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as e:
        raise ConfigError(f"{path} cannot be used: {str(e).splitlines()[0]}") from e
