"""In this process: chunk 1 trains one client after another, chunk n trains n of them at once."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fedtorch import probe, probe_private
from fedtorch.client import Client, Recipe, local_update
from fedtorch.types import ConfigError, Failure, Params, Task, Update

CACHE = 1 << 20
"""Bytes of stacked weights up to which stacking clients paid on a CPU (one core's L2)."""


@dataclass(frozen=True)
class Local:
    """Clients train in this process."""

    chunk: int | None = None
    """Clients trained side by side; none: as many as keep their weights in cache, at most 64."""
    device: str = "cpu"
    """Where clients train: cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        """Refuse a chunk of nobody and a device that is not here."""
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError(f"engine.chunk must be at least 1, got {self.chunk}")
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise ConfigError(f"engine.device {self.device!r} cannot be used here: {e}") from e

    def open(self, model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> "LocalSession":
        """Try one batch and choose the chunk size."""
        worker = copy.deepcopy(model).to(self.device)
        probe.fits(worker, clients, recipe)
        chunk = min(self.chunk or _automatic(worker, self.device), len(clients))
        recipe, chunk = probe_private.fits(worker, clients, recipe, chunk)
        notes = []
        why = probe.no_stacking(worker, clients, recipe) if chunk > 1 else None
        if why:
            notes.append(f"clients train one after another: {why}")
            chunk = 1
        strict = chunk > 1 and probe.mixes_examples(worker, clients[0].data, recipe)
        if strict:
            notes.append(
                "model or loss looks at the whole batch: only clients whose batches are equally "
                "large train side by side"
            )
        session = LocalSession(
            worker, {c.id: c for c in clients}, recipe, chunk, strict, tuple(notes)
        )
        session.restore({})  # memory of an earlier run would poison this one
        return session


@dataclass
class LocalSession:
    """A working model and the clients themselves."""

    model: nn.Module
    clients: dict[str, Client]
    recipe: Recipe
    chunk: int
    strict: bool
    """Never pad a batch: the model or the loss mixes the examples of a batch."""
    notes: tuple[str, ...] = ()
    _asked: list[tuple[list[Client], Task]] = field(default_factory=list)

    def submit(self, ids: Sequence[str], task: Task) -> None:
        """Cut the cohort into chunks."""
        self._asked.extend((chunk, task) for chunk in self.cut(ids))

    def cut(self, ids: Sequence[str], most: int | None = None) -> list[list[Client]]:
        """Chunks of clients of like size, of at most ``most`` clients, the largest clients first."""
        cohort = sorted((self.clients[i] for i in ids), key=len, reverse=True)
        chunks = []
        while cohort:
            size = min(self.chunk, most or self.chunk)
            if self.strict:
                size = sum(len(c) == len(cohort[0]) for c in cohort[:size])
                size = size if self._unpadded(len(cohort[0])) else 1
            chunks.append(cohort[:size])
            cohort = cohort[size:]
        return chunks

    def collect(self) -> Iterator[Update | Failure]:
        """Train chunk by chunk."""
        while self._asked:
            clients, task = self._asked.pop(0)
            update, failures = local_update(clients, task, self.recipe, self.model)
            if update.ids:
                yield update
            yield from failures

    def memory(self) -> dict[str, dict[str, Params]]:
        """Memory of the clients that have any."""
        return {i: c.memory for i, c in self.clients.items() if c.memory}

    def restore(self, memory: dict[str, dict[str, Params]]) -> None:
        """Put client memory back; clients not named start afresh."""
        for i, client in self.clients.items():
            client.memory = memory.get(i, {})

    def close(self) -> None:
        """Nothing to let go of."""

    def _unpadded(self, n: int) -> bool:
        size = min(self.recipe.batch_size or n, n)
        return self.recipe.drop_last or n % size == 0


def _automatic(model: nn.Module, device: str) -> int:
    if device != "cpu":
        return 64
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(1, min(64, CACHE // max(size, 1)))
