"""A trained model in a file: its weights, what is known of its data, and nothing that could run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError as SafetensorError
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as packed
from torch import Tensor, nn

from fedtorch import disk
from fedtorch.data import assembly, frames, prepared
from fedtorch.data.base import Data
from fedtorch.data.prepared import Prepared
from fedtorch.options import fit
from fedtorch.training.predict import predict
from fedtorch.types import ConfigError

EXTRA = "extra_state"
"""In the file's metadata: what ``get_extra_state`` of the model's modules gave, as JSON."""

PREPARED = "prepared"
"""In the file's metadata: how the data were prepared, as JSON."""


FRAME = "the data frame"


@dataclass(frozen=True, repr=False)
class Trained:
    """A trained model, and what it knows of its data; see ``fedtorch.load``."""

    model: nn.Module
    """In evaluation mode."""
    prepared: Prepared | None = None
    """How its data were prepared, where that was kept."""

    @property
    def classes(self) -> tuple[Any, ...]:
        """Names of the classes in the order of the outputs; none where they are not known."""
        return () if self.prepared is None else self.prepared.preparation.classes

    def predict(self, x: Any, batch_size: int = 512) -> Any:
        """The model's outputs for inputs ``x``, a row for each example, on the CPU.

        A DataFrame with the columns of the table that was trained on is prepared as that was; all else is
        taken as it is, as by ``Server.predict``. Raises ConfigError where a column is missing.
        """
        done = None if self.prepared is None else self.prepared.preparation
        if done is not None and done.columns and hasattr(x, "columns"):
            x = assembly.table_inputs(frames.frame(x, FRAME), Path(FRAME), done)
        return predict(self.model, x, batch_size)

    def labels(self, x: Any, batch_size: int = 512) -> list[Any]:
        """The class of each example by its name, or the number predicted.

        Raises ConfigError where it is not known what the outputs mean.
        """
        if self.prepared is None:
            raise ConfigError(
                "what the outputs mean was not kept with this model: save it with its data, "
                "server.save(path, data), or take predict(x) and argmax"
            )
        output, kind = self.predict(x, batch_size), self.prepared.kind
        if not isinstance(output, Tensor):
            raise ConfigError("labels are of a model that gives one tensor: take predict(x)")
        if kind == "regression":
            numbers: list[Any] = output.flatten(1).squeeze(-1).tolist()
            return numbers
        binary = kind == "binary"
        found = (output.flatten(1).squeeze(-1) > 0).long() if binary else output.argmax(1)
        return [self._named(y) for y in found.tolist()]

    def _named(self, y: Any) -> Any:
        if isinstance(y, list):
            return [self._named(one) for one in y]
        return self.classes[y] if self.classes else y

    def __repr__(self) -> str:
        """The model, its size, and the classes."""
        size = sum(p.numel() for p in self.model.parameters())
        names = ", ".join(map(str, self.classes[:6])) + (", ..." if len(self.classes) > 6 else "")
        known = f", classes {names}" if names else ""
        return f"Trained({type(self.model).__name__}, {size:,} parameters{known})"


def save(path: str | Path, model: nn.Module, data: Data | None = None) -> None:
    """Weights and buffers as safetensors, whole or not at all, and how ``data`` were prepared.

    Nothing of the rows themselves is in it, and nothing that could run. Raises ConfigError where the file
    cannot be written, or the model holds what no file can.
    """
    path = Path(fit("path", path, str | Path)).expanduser()
    fit("data", data, Data | None)
    savable(model)
    told = {}
    if data is not None:
        known = replace(Prepared.of(data), train="", test="", sizes=(0, 0), owners="")
        bare = replace(known, preparation=replace(known.preparation, remarks=()))
        told = {PREPARED: json.dumps(asdict(bare))}
    try:
        write(path, model, told)
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{path} cannot be written: {getattr(e, 'strerror', None) or e}") from e


def load(path: str | Path, model: nn.Module) -> Trained:
    """A model that ``Server.save`` or a run wrote, given one of the same shape: its weights are replaced.

    ``path``: the file, or a run folder. No code is read, whoever wrote it. Raises ConfigError where it is
    damaged, or of another model.
    """
    path = Path(fit("path", path, str | Path)).expanduser()
    fit("model", model, nn.Module)
    kept = prepared.load(path) if path.is_dir() else None
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file of a model")
    told = read(path, model)
    if PREPARED in told:
        kept = prepared.read(json.loads(told[PREPARED]), path)
    return Trained(model.eval(), kept)


def write(path: Path, model: nn.Module, told: Mapping[str, str] | None = None) -> None:
    """The model's ``state_dict``, and ``told`` beside it."""
    whole = model.state_dict()
    state = {k: v.detach().cpu().contiguous().clone() for k, v in tensors(whole).items()}
    extra = {k: v for k, v in whole.items() if k not in state}
    with disk.whole(path) as file:
        more = {EXTRA: json.dumps(extra)} if extra else {}
        file.write(packed(state, {"sha256": digest(state), **more, **(told or {})}))


def read(path: Path, model: nn.Module) -> dict[str, str]:
    """Load the weights, and return what is told beside; raises ConfigError where they do not fit."""
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
        why = " ".join(
            line.strip() for line in str(e).splitlines()[:2]
        )  # torch names the weights second
        raise ConfigError(f"{path} cannot be used: {why}") from e
    return dict(told)


def savable(model: nn.Module) -> None:
    """Raises ConfigError naming what ``write`` could not save, before anything is trained."""
    for name, value in model.state_dict().items():
        where = f"{name} of model {type(model).__name__}"
        try:
            if isinstance(value, Tensor):
                packed({name: torch.empty(0, dtype=value.dtype)})
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


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and numbers of tensors on the CPU."""
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
