"""When a checkpoint is due, and who writes it: the training itself, or a thread beside it."""

import copy
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from fedtorch.run import checkpoint

Every = int | Literal["auto"]

LARGE = 8 << 20
"""Bytes of a checkpoint from which on ``auto`` no longer writes one each round."""

SECONDS = 30.0
"""And begins the next one so much later."""


class Saver:
    """Writes the checkpoints of a run one after another, each whole before the next begins.

    ``every`` so many rounds the training waits for one. ``auto`` writes from a copy of the state while the
    next round trains: each round, and of a large state every ``SECONDS``. Where a ledger is charged before
    each round, a round that is done again costs again: there ``auto`` is each round, and waited for.
    """

    def __init__(self, folder: Path, every: Every, charged: bool) -> None:
        """``charged``: there is such a ledger. The folder may hold checkpoints of before."""
        self.every = 1 if every == "auto" and charged else every
        self.size = max((p.stat().st_size for p in checkpoint.everything(folder)), default=0)
        self.began = time.monotonic()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    @property
    def sparing(self) -> bool:
        """Whether some rounds get none because it is large."""
        return self.every == "auto" and self.size >= LARGE

    def due(self, round: int) -> bool:
        """Whether this round gets one; the last does in any case."""
        if isinstance(self.every, int):
            return round % self.every == 0
        return not self.sparing or time.monotonic() - self.began >= SECONDS

    def save(
        self, state: dict[str, Any], write: Callable[[dict[str, Any]], Path], last: bool = False
    ) -> None:
        """Write a state, once the one before is written; ``write`` returns the file.

        What kept the one before from being written is raised here, after this one, or by ``wait``.
        """
        try:
            self.wait()
        finally:
            self.began = time.monotonic()
            if self.every == "auto" and not last:
                self.writing = self.thread.submit(self._write, copy.deepcopy(state), write)
            else:
                self._write(state, write)

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, state: dict[str, Any], write: Callable[[dict[str, Any]], Path]) -> None:
        self.size = write(state).stat().st_size
