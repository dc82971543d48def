"""In this process, a chunk of clients at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import nn

from fedtorch.checks import data, keeps, reached, short, told
from fedtorch.checks.model import aside, modes
from fedtorch.checks.outputs import labels_fit
from fedtorch.checks.probe import fits
from fedtorch.checks.standins import shown
from fedtorch.client import Client
from fedtorch.engines.solver_choice import Choice, choose
from fedtorch.options import COUNT, brief, check
from fedtorch.recipe import Recipe
from fedtorch.training import local_steps
from fedtorch.training.local_update import local_update
from fedtorch.training.outline import copied, untouched
from fedtorch.training.personal import given
from fedtorch.training.reserve import Reserve
from fedtorch.training.together import Joins, local_updates
from fedtorch.types import ConfigError, Failure, Params, Released, Task, Tasks

Asked = TypeVar("Asked")
Visit = tuple[Client, int]
"""A client, and the place of what it was sent among ``Tasks``."""


@dataclass(frozen=True, kw_only=True)
class Local:
    """Clients train in this process."""

    __repr__ = brief

    chunk: int | None = None
    """Clients trained side by side; none: as many as stay in cache."""
    device: str = "cpu"
    """Where clients train: cpu, cuda, cuda:1, ..."""
    solver: str = "auto"
    """auto, fast (known layers, no autograd), stacked (torch.func.vmap) or general (any model)."""
    dtype: str = "float32"
    """float32, or bf16 for large products and convolutions; weights and steps stay float32."""

    def __post_init__(self) -> None:
        """Refuse a chunk of nobody."""
        check(self, "engine", chunk=COUNT)

    def open(self, model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> "LocalSession":
        """Try one batch and choose how to train."""
        usable(self.device)
        with keeps.from_no_batch(recipe), data.readable():
            said = data.check(clients, recipe)
            worker = copied(model).to(self.device)
            tried = shown(worker, clients, recipe)
            with aside(model, local=recipe.local is not None):
                found = fits(worker, tried, recipe)
            labels_fit(worker, clients, tried, recipe)
            told.try_figures(worker, tried, recipe)
            short.batches(worker, tried, recipe)
            reached.others(model, worker, tried, recipe)
            with untouched(worker):
                choice = choose(
                    worker, clients, recipe, self.chunk, self.solver, self.dtype, found.changes
                )
        said += local_steps.notes(worker, [c.taken() for c in clients], recipe)
        by_id = {c.id: c for c in clients}
        notes = (*modes(model), *found.notes, *said, *choice.notes)
        session = LocalSession(worker, by_id, choice.recipe, choice, notes)
        session.restore({})  # memory of an earlier run would poison this one
        return session


def falling(cohort: list[Client], workers: int, most: int) -> list[list[Client]]:
    """Shares of clients that train one after another, the largest clients first, of at most so many.

    Each is half of an even part of the examples that are left, so that few are handed over and all workers
    end at about the same time, whoever is the faster.
    """
    sizes = [*map(len, cohort)]
    shares, first, left = list[list[Client]](), 0, sum(sizes)
    while first < len(cohort):
        end = first + 1
        taken = sizes[first]
        while 2 * workers * taken < left and end < min(len(cohort), first + most):
            taken += sizes[end]
            end += 1
        shares.append(cohort[first:end])
        first, left = end, left - taken
    return shares


def usable(device: str, option: str = "engine.device") -> None:
    """Raises ConfigError where there is no such device; a run's options can be read all the same."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(
            f"{option} {device!r} cannot be used here: {str(e).splitlines()[0]}; {option} cpu trains "
            "anywhere"
        ) from e


@dataclass
class LocalSession:
    """A working model and the clients themselves."""

    model: nn.Module
    clients: dict[str, Client]
    recipe: Recipe
    choice: Choice
    notes: tuple[str, ...] = ()
    reserve: Reserve = field(default_factory=Reserve)
    """Memory of the clients' sum, kept between rounds until the session is closed."""
    _asked: list[tuple[list[Client], Task]] = field(default_factory=list)
    _joined: list[tuple[list[Visit], Tasks]] = field(default_factory=list)

    def submit(self, ids: Sequence[str], task: Task) -> None:
        """Cut the cohort into chunks; what an interrupt left of an earlier one is let go."""
        task = task.filled(self.given)
        self._asked, self._joined = [(chunk, task) for chunk in self.cut(ids)], []

    @property
    def joins(self) -> bool:
        """Whether clients that were sent different models may train in one call."""
        can = getattr(self.choice.solver, "joins", None)
        return bool(can and can(self.recipe))

    def join(self, who: Sequence[tuple[str, int]], sent: Tasks) -> None:
        """As ``submit``, of clients with the place of what each was sent; only where it ``joins``."""
        sent = sent.filled(self.given)
        self._asked, self._joined = [], [(chunk, sent) for chunk in self.cut_joined(who)]

    def cut_joined(self, who: Sequence[tuple[str, int]], workers: int = 1) -> list[list[Visit]]:
        """As ``cut``."""
        pairs = [(self.clients[i], n) for i, n in who]
        return self.shared_out(sorted(pairs, key=lambda pair: -len(pair[0])), workers)

    @cached_property
    def given(self) -> Params:
        """The model before any visit."""
        return given(self.model, self.recipe.strategy.personal)

    def cut(self, ids: Sequence[str], workers: int = 1) -> list[list[Client]]:
        """Chunks of clients of like size, for so many workers, the largest clients first."""
        cohort = sorted((self.clients[i] for i in ids), key=len, reverse=True)
        if self.choice.group > 1 and workers > 1:
            return falling(cohort, workers, self.choice.group)
        if not self.choice.strict:
            return self.shared_out(cohort, workers)
        chunks, limit = list[list[Client]](), self.limit(len(cohort), workers)
        while cohort:
            # who has equally many examples has equally large batches, step by step
            size = sum(len(c) == len(cohort[0]) for c in cohort[:limit])
            chunks.append(cohort[:size])
            cohort = cohort[size:]
        return chunks

    def shared_out(self, cohort: list[Asked], workers: int = 1) -> list[list[Asked]]:
        """Chunks of a cohort in this order."""
        size = self.limit(len(cohort), workers)
        return [cohort[k : k + size] for k in range(0, len(cohort), size)]

    def limit(self, clients: int, workers: int = 1) -> int:
        """Clients in a chunk, of so many."""
        limit = self.choice.group if self.choice.group > 1 else self.choice.chunk
        limit = min(limit, -(-clients // workers) or 1)
        # equal shares: a small rest would cost as many calls as a whole chunk
        return -(-clients // -(-clients // limit)) if clients else limit

    def collect(self) -> Iterator[Released | Failure]:
        """Train chunk by chunk."""
        recipe, model, solve = self.recipe, self.model, self.choice.solver
        while self._asked or self._joined:
            if self._asked:
                update, failures = local_update(
                    *self._asked.pop(0), recipe, model, solve, self.reserve
                )
            else:
                visits, tasks = self._joined.pop(0)
                update, failures = local_updates(visits, tasks, recipe, model, cast(Joins, solve))
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
        """Let go of the memory that is kept."""
        self.reserve.clear()
