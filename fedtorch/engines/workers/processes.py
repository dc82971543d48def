"""Worker processes on this machine, fed through shared memory.

Weights go to all workers through one shared block, an outcome comes back through a block of the worker's
own, and pipes carry only a few words. Client memory is kept here and travels with the work: a worker that
dies takes nothing with it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch.client import Client
from fedtorch.engines import wire
from fedtorch.engines.local import LocalSession, usable
from fedtorch.engines.messages import asking, read_outcome
from fedtorch.engines.workers import kit, pool
from fedtorch.engines.workers.board import DEATHS, Job
from fedtorch.engines.workers.forks import Forks
from fedtorch.engines.workers.worker import work
from fedtorch.engines.workers.worth import Worth
from fedtorch.options import COUNT, brief, check
from fedtorch.recipe import Recipe
from fedtorch.types import ClientError, ConfigError, Failure, Released, Task, Tasks

START_SECONDS = 120.0
"""Most a worker may take to import torch and say that it is ready."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Clients train in worker processes of this machine."""

    __repr__ = brief

    workers: int | None = None
    """Worker processes; none: one for each core, or for each GPU with device cuda."""
    chunk: int | None = None
    """Clients trained side by side in a worker; none: as engine local, shared out evenly."""
    device: str = "cpu"
    """cpu, or cuda for one worker on each GPU."""
    solver: str = "auto"
    """auto, fast, stacked or general, as for engine local."""
    dtype: str = "float32"
    """float32 or bf16, as for engine local."""

    def __post_init__(self) -> None:
        """Refuse what cannot be started."""
        check(self, "engine", workers=COUNT, chunk=COUNT)
        pool.options(self.chunk, self.device, self.solver, self.dtype)

    def devices(self) -> list[str]:
        """The device of each worker."""
        places = [self.device]
        if self.device == "cuda":
            places = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
        count = self.workers or (cores() if self.device == "cpu" else len(places))
        return [places[k % len(places)] for k in range(count)]

    def open(
        self, model: nn.Module, clients: Sequence[Client], recipe: Recipe
    ) -> "ProcessesSession":
        """Check that these fit together, then start the workers."""
        usable(self.device)
        devices = self.devices()
        own = pool.options(self.chunk, devices[0], self.solver, self.dtype)
        local, body, block = pool.prepare(own, model, clients, recipe, shared)
        # who says how large chunks are, or asks for one worker, has reasons of his own
        ruled = self.chunk is None and self.device == "cpu" and len(devices) > 1
        worth = Worth.of(local) if ruled else None
        return ProcessesSession(local, body, block, devices, self.chunk is None, worth)


class ProcessesSession(pool.PoolSession):
    """The workers, and the jobs they are at."""

    def __init__(
        self,
        local: LocalSession,
        body: bytes,
        block: Tensor,
        devices: list[str],
        spread: bool,
        worth: Worth | None = None,
    ) -> None:
        """Start a worker for each of ``devices``; ``worth``: whether a round is left to them."""
        super().__init__(local, len(devices), spread)
        self.worth, self.here = worth, False
        everybody = [*local.clients.values()]
        if worth is not None:
            self.notes += worth.said(everybody, len(devices))
            devices = devices if worth.pays(everybody) else []  # no round is
        self.kit = body, block
        self.inbox = shared(0)
        self.workers: list[Worker] = []
        self.forks = Forks()
        self.notes += self.forks.notes if devices else ()
        try:
            self.workers = [Worker(self.forks, d, *self.kit) for d in devices]
            for worker in self.workers:
                worker.wait_ready()
        except BaseException:
            self.close()
            raise

    def submit(self, ids: Sequence[str], task: Task) -> None:
        """A round that is not worth sharing out is one of this process."""
        asked = [self.local.clients[i] for i in ids]
        self.here = self.worth is not None and not self.worth.pays(asked)
        if self.here:
            self.local.submit(ids, task)
        else:
            super().submit(ids, task)

    def join(self, who: Sequence[tuple[str, int]], sent: Tasks) -> None:
        """As above."""
        asked = [self.local.clients[i] for i, _ in who]
        self.here = self.worth is not None and not self.worth.pays(asked)
        if self.here:
            self.local.join(who, sent)
        else:
            super().join(who, sent)

    def collect(self) -> Iterator[Released | Failure]:
        """Hand chunks to free workers and their outcomes on, in the order of the chunks."""
        if self.here:
            yield from self.local.collect()
            return
        while self.board.open:
            for worker in self.workers:
                if worker.job is None:
                    self._assign(worker)
            busy = {w.pipe: w for w in self.workers if w.job is not None}
            for pipe in connection.wait([*busy]):
                self._hear(busy[pipe])
            yield from self.board.ready()

    def close(self) -> None:
        """End the workers, and let go of what rounds in this process keep."""
        self.local.close()
        for worker in self.workers:
            worker.end()
        self.workers = []
        self.forks.close()

    def _assign(self, worker: "Worker") -> None:
        other = self.board.waiting and self.board.waiting[0].task is not self.task
        if other and any(w.job is not None for w in self.workers):
            return  # the shared block still holds the weights of a task that is being read
        job = self.board.take()
        if job is None:
            return
        if job.task is not self.task:
            packed = wire.pack(asking(job.task))
            if packed.size > len(self.inbox):
                self.inbox = shared(packed.size)
            packed.write(self.inbox)
            self.task, self.task_size = job.task, packed.size
        try:
            worker.give(job, self.inbox, self.task_size)
        except OSError:
            self._replace(worker)

    def _hear(self, worker: "Worker") -> None:
        try:
            word, *rest = worker.pipe.recv()
        except (EOFError, OSError):
            return self._replace(worker)
        job = worker.job
        assert job is not None
        if word == "need":
            worker.grow(rest[0])
            try:
                worker.pipe.send(("box", worker.box))
            except OSError:  # it died between asking and hearing
                self._replace(worker)
            return None
        worker.job = None
        if word == "error":
            if job.number in self.board.running:
                self.board.clear()
                raise ClientError(rest[0])
            return None
        # a copy: the worker's block is its own again with the next job, which it gets before this is read
        found = worker.box[: rest[0]].clone()
        self._assign(worker)
        self.board.done(job.number, read_outcome(wire.decode(found), job.ids))
        return None

    def _replace(self, worker: "Worker") -> None:
        job, code = worker.job, worker.end()
        self._start_again(worker)
        if job is not None:
            self.board.lost(job.number, f"the last with exit code {code}")

    def _start_again(self, worker: "Worker") -> None:
        """A new worker in the place of one that died; what kills a worker may kill the next one too."""
        place = self.workers.index(worker)
        for _ in range(DEATHS):
            fresh = self.workers[place] = Worker(self.forks, worker.device, *self.kit)
            try:
                return fresh.wait_ready()
            except ConfigError:
                code = fresh.process.exitcode
        raise ClientError(
            f"worker processes die as they start, {DEATHS} in a row, the last with exit code {code}: out "
            "of memory, or something kills them; --resume goes on from the last checkpoint"
        )


class Worker:
    """This side of one worker process."""

    def __init__(self, forks: Forks, device: str, body: bytes, block: Tensor) -> None:
        """Start it; it is ready when ``wait_ready`` returns."""
        context = forks.context
        self.device = device
        self.job: Job | None = None
        self.box = torch.empty(0, dtype=torch.uint8)
        self.inbox: Tensor | None = None
        self.pipe, theirs = context.Pipe()
        given = theirs, body, block, device, forks.folder
        self.process = context.Process(target=work, args=given, daemon=True, name="fedtorch worker")
        with forks.serving():
            self.process.start()
        theirs.close()  # so that the pipe ends when the worker does

    def wait_ready(self) -> None:
        """Wait for the worker's first word; raises ConfigError when it cannot start."""
        word: tuple[Any, ...] = ("silent",)
        with suppress(EOFError, OSError):
            if self.pipe.poll(START_SECONDS):
                word = self.pipe.recv()
        if word[0] == "ready":
            return
        code = self.end()
        why = word[1] if word[0] == "broken" else f"exit code {code}"
        raise ConfigError(
            f"a worker process could not start ({why}); a script that uses engine processes needs "
            "its work under `if __name__ == '__main__':`, and its classes in a module workers can import "
            "(those of a notebook, of a prompt or of standard input they cannot), or engine local"
        )

    def give(self, job: Job, inbox: Tensor, task_size: int) -> None:
        """Send a job: the shared weights are in ``inbox``, memory goes through the worker's block."""
        if self.inbox is not inbox:
            self.inbox = inbox
            self.pipe.send(("inbox", inbox))
        memory = wire.pack(kit.memory_message(job.memory, job.ids))
        if memory.size > len(self.box):
            self.grow(memory.size)
            self.pipe.send(("box", self.box))
        memory.write(self.box)
        self.job = job
        self.pipe.send(("work", job.ids, task_size, memory.size, job.of))

    def grow(self, size: int) -> None:
        """A larger block for this worker."""
        self.box = shared(size)

    def end(self) -> int | None:
        """Ask it to leave, then make it; returns its exit code."""
        with suppress(OSError):
            self.pipe.send(("end",))
        self.pipe.close()
        self.process.join(0.1 if self.job is not None else 2)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        code: int | None = self.process.exitcode
        return code


def shared(size: int) -> Tensor:
    """A block of memory that worker processes can map, uint8; unlinked, so nothing can stay behind."""
    block = torch.zeros(max(size + size // 8, 1 << 12), dtype=torch.uint8)
    block.share_memory_()
    return block


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
