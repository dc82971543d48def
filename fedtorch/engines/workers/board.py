"""Which chunk goes next, which came back, and in what order they are handed on.

Workers finish in any order, but sums depend on it: outcomes leave the board in the order of their chunks,
so that a run repeats to the last bit whoever was faster.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fedtorch.client import Client
from fedtorch.engines.local import Visit
from fedtorch.engines.messages import Memory, Outcome
from fedtorch.types import ClientError, Failure, Released, Task, Tasks

DEATHS = 3
"""Workers a chunk may lose before it is held to be the cause."""
AHEAD = 4
"""Finished chunks that may wait for an earlier one, for each worker."""


@dataclass
class Job:
    """One chunk's work."""

    number: int
    clients: list[Client]
    task: Task | Tasks
    of: list[int] = field(default_factory=list)
    """Of several tasks, the place of each client's."""
    deaths: int = 0

    @property
    def ids(self) -> list[str]:
        """Who is in the chunk."""
        return [c.id for c in self.clients]

    @property
    def memory(self) -> Memory:
        """What the chunk's clients remember."""
        return {c.id: c.memory for c in self.clients if c.memory}


@dataclass
class Board:
    """The jobs of a session."""

    workers: int
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[int, Job] = field(default_factory=dict)
    finished: dict[int, Outcome] = field(default_factory=dict)
    made: int = 0
    handed: int = 0

    def add(self, chunks: Sequence[list[Client]], task: Task) -> None:
        """Put up chunks, the dearest first."""
        for chunk in chunks:
            self.waiting.append(Job(self.made, chunk, task))
            self.made += 1

    def add_joined(self, chunks: Sequence[list[Visit]], tasks: Tasks) -> None:
        """The same of clients that were sent different models."""
        for chunk in chunks:
            who, of = [c for c, _ in chunk], [n for _, n in chunk]
            self.waiting.append(Job(self.made, who, tasks, of))
            self.made += 1

    def take(self) -> Job | None:
        """The next job for a free worker, unless too much waits for an earlier chunk."""
        if not self.waiting or self.waiting[0].number >= self.handed + AHEAD * self.workers:
            return None
        job = self.waiting.popleft()
        self.running[job.number] = job
        return job

    def done(self, number: int, outcome: Outcome) -> None:
        """A chunk came back; one that was called off is let go."""
        job = self.running.pop(number, None)
        if job is None:
            return
        for client in job.clients:
            client.memory = outcome.memory.get(client.id, client.memory)
        self.finished[number] = outcome._replace(memory={})

    def lost(self, number: int, why: str) -> None:
        """A worker died at this job: do it again; raises ClientError when it keeps killing workers."""
        job = self.running.pop(number, None)
        if job is None:
            return
        job.deaths += 1
        if job.deaths >= DEATHS:
            self.clear()
            who = ", ".join(job.ids[:3]) + (" ..." if len(job.ids) > 3 else "")
            raise ClientError(
                f"client {who}, round {job.task.round}: {job.deaths} workers died at it, {why}; out "
                "of memory, its model or dataset crashes Python, or something kills them"
            )
        self.waiting.appendleft(job)

    def ready(self) -> Iterator[Released | Failure]:
        """Outcomes whose turn has come."""
        while self.handed in self.finished:
            outcome = self.finished.pop(self.handed)
            self.handed += 1
            if outcome.update.ids:
                yield outcome.update
            yield from outcome.failures

    def clear(self) -> None:
        """Call everything off."""
        self.waiting.clear()
        self.running.clear()
        self.finished.clear()
        self.handed = self.made

    @property
    def open(self) -> bool:
        """Whether anything is still to be handed on."""
        return self.handed < self.made
