"""What a run shows of itself beside its figures: ``report.json``, and the page made of all its files.

``report.json`` holds what no other file has: how many rounds were asked for, who holds what (where that may
be told) and the confusion matrix of the test set. So a report needs neither the data nor anybody's code.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fedtorch import disk
from fedtorch.client import Client
from fedtorch.data.base import Data
from fedtorch.options import fit
from fedtorch.server import Server
from fedtorch.training.predict import confusion
from fedtorch.types import ConfigError

FILE = "report.json"
FORMAT = "fedtorch report 1"
KEPT_CLIENTS = 1000
"""Clients that are kept of many."""
MOST_CLASSES = 200
"""Classes up to which there is a matrix."""


@dataclass(frozen=True)
class Shown:
    """Writes ``report.json``, at the start of a run and once more at its end."""

    folder: Path
    rounds: int
    """Asked for in all."""
    classes: Sequence[Any] = ()
    """Their names; none: their numbers."""
    holders: Mapping[str, Any] = field(default_factory=dict)
    """Client -> examples, and how many of each class (``held``); none where that is not to be told."""
    private: bool = False
    """The file is for its owner alone, as no guarantee covers who holds what."""

    @classmethod
    def of(cls, server: Server, folder: Path, rounds: int, data: Data | None = None) -> "Shown":
        """Of a server's clients and the classes of their data; who holds what unless that is hidden."""
        hidden = server.recipe.privacy.strict or server.recipe.hides
        here = [] if hidden else [c for c in server.clients if isinstance(c, Client)]
        names = () if data is None else data.preparation.classes
        return cls(folder, rounds, names, examples_held(here, data), server.private is not None)

    def write(self, model: Any = None, test: Any = None, kind: str = "") -> None:
        """The file, whole or not at all; with a model's confusion matrix on test data, if they have one."""
        table: dict[str, Any] = {"format": FORMAT, "rounds": self.rounds}
        if self.classes and len(self.classes) <= MOST_CLASSES:
            table["classes"] = [str(c) for c in self.classes]
        if self.holders:
            table["clients"] = dict([*self.holders.items()][:KEPT_CLIENTS])
            table["clients_in_all"] = len(self.holders)
        found = None if test is None else confusion(model, test, kind)
        if found is not None and len(found) <= MOST_CLASSES:
            table["confusion"] = found.tolist()
        with disk.whole(self.folder / FILE, private=self.private and bool(self.holders)) as file:
            file.write((json.dumps(table) + "\n").encode())


def examples_held(clients: Sequence[Client], data: Data | None = None) -> dict[str, list[Any]]:
    """Client -> [training examples, those of each class]; the latter empty where classes are not known.

    ``data``: what the clients' were cut from, where that was loaded.
    """
    own = [_classes(c.data, data) for c in clients]
    known = all(y is not None for y in own)
    count = max((int(y.max()) + 1 for y in own if y is not None and len(y)), default=0)
    return {
        c.id: [
            len(c),
            torch.bincount(y, minlength=count).tolist() if known and y is not None else [],
        ]
        for c, y in zip(clients, own, strict=True)
    }


def _classes(examples: Any, data: Data | None) -> Tensor | None:
    """The class of each example, where all lie in memory: none is read or drawn for a table."""
    labels = None if data is None else data.labels
    if data is not None and labels is None:
        return None
    if data is not None and labels is not None and isinstance(examples, Subset):
        cut = examples.dataset is data.train
        return labels[torch.as_tensor(examples.indices)] if cut else None
    y = examples.tensors[-1].cpu() if isinstance(examples, TensorDataset) else None
    if y is None or y.dim() != 1 or (y.is_floating_point() and data is None):
        return None
    return y.long() if bool(((y >= 0) & (y < MOST_CLASSES)).all()) else None


def read(folder: Path) -> dict[str, Any]:
    """What a run kept; nothing of older runs. Raises ConfigError where it cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is damaged: {e}") from e
    if table.get("format") != FORMAT:
        raise ConfigError(f"{path}: another version wrote it, and what it holds is left out")
    return table


def report(
    folder: str | Path, output: str | Path | None = None, *, against: str | Path | None = None
) -> Path:
    """Write a run folder's ``report.html``: one page that needs no network; returns where it is.

    ``output``: another file, or a folder for it. ``against``: a second run; the page says what differs. It
    is made of the run's files alone: neither the data nor the model's code need be there. Raises
    ConfigError where the folder holds no run, or nothing can be written.
    """
    from fedtorch.run import page, results  # the reader of options comes with them

    fit("folder of report", folder, str | Path)
    run = results.load(Path(folder).expanduser())
    other = None if against is None else results.load(Path(against).expanduser())
    return page.write(run, other, None if output is None else Path(output).expanduser())
