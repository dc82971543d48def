"""What engines with workers have in common; they differ in how they reach a worker."""

import pickle
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fedtorch.client import Client
from fedtorch.engines.local import Local, LocalSession
from fedtorch.engines.workers import kit
from fedtorch.engines.workers.board import Board
from fedtorch.recipe import Recipe
from fedtorch.types import Params, Task, Tasks


def options(chunk: int | None, device: str, solver: str, dtype: str) -> Local:
    """How each worker trains."""
    return Local(chunk=chunk, device=device, solver=solver, dtype=dtype)


def prepare(
    options: Local,
    model: nn.Module,
    clients: Sequence[Client],
    recipe: Recipe,
    block: Callable[[int], Tensor],
    dumps: Callable[[object], bytes] = pickle.dumps,
) -> tuple[LocalSession, bytes, Tensor]:
    """Check here that all fit together; then what a worker needs: a pickled part and a block of data."""
    local = options.open(model, clients, recipe)
    body, data = kit.pack(model, clients, local.recipe, local.choice.solver, dumps)
    return local, body, data.fill(block(data.size))


class PoolSession:
    """The clients, whose memory stays in this process, and the board of their chunks."""

    def __init__(self, local: LocalSession, workers: int, spread: bool) -> None:
        """``spread``: small chunks, so that all workers have something to do."""
        self.local, self.spread = local, spread
        self.notes = local.notes
        self.board = Board(workers)
        self.task: Task | Tasks | None = None
        """The task whose weights the workers can reach now."""

    def submit(self, ids: Sequence[str], task: Task) -> None:
        """Cut the cohort into chunks, the largest clients first; what an interrupt left is called off."""
        if self.board.open:
            self.board.clear()
        self.board.add(self.local.cut(ids, self._shares), task)

    @property
    def joins(self) -> bool:
        """As workers do: the weights are those of one process, whoever trains."""
        return self.local.joins

    def join(self, who: Sequence[tuple[str, int]], sent: Tasks) -> None:
        """As ``submit``, of clients that were sent different models."""
        if self.board.open:
            self.board.clear()
        self.board.add_joined(self.local.cut_joined(who, self._shares), sent)

    @property
    def _shares(self) -> int:
        return self.board.workers if self.spread else 1

    def memory(self) -> dict[str, dict[str, Params]]:
        """Memory of the clients that have any."""
        return self.local.memory()

    def restore(self, memory: dict[str, dict[str, Params]]) -> None:
        """Put client memory back; clients not named start afresh."""
        self.local.restore(memory)
