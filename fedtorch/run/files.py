"""The folder of a run: what it is made of, and what it leaves behind."""

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedtorch import disk
from fedtorch.run import checkpoint, versions
from fedtorch.types import ConfigError

PACKAGES = ("fedtorch", "torch", "numpy", "numba", "tensorboard", "safetensors")

MODEL = "model.safetensors"

LEDGER = "ledger.jsonl"
"""What the privacy budget was spent on: written before anything is released."""

SUMS = "SHA256SUMS"

SUMMED = ("config.toml", "metrics.jsonl", MODEL, "summary.json", "privacy.json", LEDGER)
"""Files that must stay what they are once a run has ended."""

EXTRA = "extra_state"
"""In the model file's metadata: what ``get_extra_state`` of its modules gave, as JSON."""


def create(folder: Path) -> None:
    """Make the folder; raises ConfigError when another run is in it or it cannot be made."""
    try:
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:  # ValueError: a path with a zero byte
        raise unwritable(folder, e) from e


def try_out(folder: Path) -> None:
    """Make room for checkpoints and write a byte; raises ConfigError when that fails."""
    probe = folder / ".writable"
    try:
        (folder / "checkpoints").mkdir(exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as e:
        raise unwritable(folder, e) from e


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
    whole = model.state_dict()
    state = {k: v.detach().cpu().contiguous().clone() for k, v in tensors(whole).items()}
    extra = {k: v for k, v in whole.items() if k not in state}
    try:
        with disk.whole(folder / MODEL) as file:
            told = {EXTRA: json.dumps(extra)} if extra else {}
            file.write(save(state, {"sha256": digest(state), **told}))
    except (OSError, SafetensorError) as e:
        raise ConfigError(
            f"the trained model cannot be written to {folder} ({getattr(e, 'strerror', None) or e}): "
            f"make room, then fedtorch {command} --run-dir {folder} --resume"
        ) from e


def savable(model: nn.Module) -> None:
    """Raises ConfigError naming what ``write_model`` could not save, before anything is trained."""
    for name, value in model.state_dict().items():
        where = f"{name} of model {type(model).__name__}"
        try:
            if isinstance(value, Tensor):
                save({name: torch.empty(0, dtype=value.dtype)})
            elif json.loads(json.dumps(value)) != value:
                raise ValueError("it does not come back as it was")
        except Exception as e:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"{where} is {kind}, which a model file cannot hold ({e}): a state_dict may hold tensors "
                "and, as extra state, what JSON can"
            ) from e


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a ``state_dict``; the rest is a module's extra state."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor)}


def write_json(path: Path, table: dict[str, Any]) -> None:
    """A table as a JSON file; JSON has no NaN: a figure that overflowed is null."""
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in table.items()
    }
    disk.replace(path, json.dumps(plain, indent=2) + "\n")


def read_model(folder: Path, model: nn.Module) -> None:
    """Load a run's trained weights; raises ConfigError when they are missing, damaged or do not fit."""
    path = folder / MODEL
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no trained model yet: fedtorch train --run-dir {folder} --resume"
        )
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
        if told.get("sha256") != digest(state):
            why = (
                "its numbers do not match its digest"
                if "sha256" in told
                else "it carries no digest"
            )
            raise ConfigError(f"{path} is damaged or of another version: {why}")
        model.load_state_dict(state | json.loads(told.get(EXTRA, "{}")))
    except ConfigError:
        raise
    except (SafetensorError, RuntimeError, OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be used: {str(e).splitlines()[0]}") from e


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and numbers of tensors on the CPU."""
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


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
