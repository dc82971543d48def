"""What every engine offers: it decides where a chunk of clients runs, never what it computes."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import nn

from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.types import Failure, Params, Released, Task


class Session(Protocol):
    """Clients and a model, ready to train.

    One that can train clients of several models in one call says ``joins``, and has ``join(who, tasks)``
    beside ``submit``: see ``LocalSession``.
    """

    notes: tuple[str, ...]
    """Choices the engine made, one plain sentence each."""

    def submit(self, ids: Sequence[str], task: Task) -> None:
        """Ask these clients to work on a task."""

    def collect(self) -> Iterator[Released | Failure]:
        """One outcome for each client asked, in Updates of one or more, as they arrive."""

    def memory(self) -> dict[str, dict[str, Params]]:
        """Client memory by id, for a checkpoint; only where clients live in this process."""

    def restore(self, memory: dict[str, dict[str, Params]]) -> None:
        """Put client memory back."""

    def close(self) -> None:
        """Let go of workers."""


class Engine(Protocol):
    """Options of an engine (a frozen dataclass)."""

    def open(self, model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> Session:
        """Check that these fit together and start a session."""
