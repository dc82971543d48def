"""The same chunks on a Ray cluster: actors hold the clients' data, weights are put once a round.

Without an address a cluster of this machine alone is started, on loopback, and ended with the session.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtorch.client import Client
from fedtorch.engines import wire
from fedtorch.engines.local import LocalSession
from fedtorch.engines.messages import asking, read_outcome
from fedtorch.engines.workers import kit, pool
from fedtorch.engines.workers.board import Job
from fedtorch.engines.workers.processes import cores
from fedtorch.engines.workers.worker import Worker
from fedtorch.options import COUNT, check
from fedtorch.recipe import Recipe
from fedtorch.types import ClientError, ConfigError, Failure, Released

START_SECONDS = 180.0
"""Most a cluster may take to give us a first actor, at the start or after all were lost."""


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Clients train on a Ray cluster."""

    workers: int | None = None
    """Actors; none: one for each core of the cluster, or for each GPU with device cuda."""
    chunk: int | None = None
    """Clients trained side by side in an actor; none: as engine local, shared out evenly."""
    device: str = "cpu"
    """cpu, or cuda for one GPU to each actor."""
    address: str = ""
    """A running cluster (HOST:6379, or auto for the one of this machine); empty: start one here."""
    solver: str = "auto"
    """auto, fast, stacked or general, as for engine local."""
    dtype: str = "float32"
    """float32 or bf16, as for engine local."""

    def __post_init__(self) -> None:
        """Refuse what cannot be started."""
        check(self, "engine", workers=COUNT, chunk=COUNT)
        pool.options(self.chunk, "cpu", self.solver, self.dtype)
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"engine.device must be cpu or cuda with Ray, got {self.device!r}")

    def open(self, model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> "RaySession":
        """Check that these fit together, then reach the cluster and start the actors."""
        # this machine may have no GPU, so what is tried here is tried on its CPU
        here = pool.options(self.chunk, "cpu", self.solver, self.dtype)
        installed()
        local, body, block = pool.prepare(here, model, clients, recipe, wire.zeros, by_value)
        return RaySession(local, (body, block.numpy()), self, connect(self.address, self.workers))


class RaySession(pool.PoolSession):
    """Actors, and the jobs they are at."""

    def __init__(
        self, local: LocalSession, parts: tuple[bytes, np.ndarray], options: Ray, own: bool
    ) -> None:
        """Start the actors; ``own``: the cluster is ours to end."""
        import ray

        kind = "GPU" if options.device == "cuda" else "CPU"
        count = options.workers or int(ray.cluster_resources().get(kind, 0))
        super().__init__(local, max(count, 1), options.chunk is None)
        self.options, self.own = options, own
        self.parts = tuple(ray.put(p) for p in parts)
        self.actors: list[Actor] = []
        self.weights: Any = None
        try:
            if count < 1:
                raise ConfigError(f"the Ray cluster has no {kind}")
            self.actors = [self._start() for _ in range(count)]
            self._first_ready()
        except BaseException:
            self.close()
            raise

    def collect(self) -> Iterator[Released | Failure]:
        """Hand chunks to free actors and their outcomes on, in the order of the chunks."""
        import ray

        idle_since = time.monotonic()
        while self.board.open:
            for actor in self.actors:
                if actor.ready and actor.job is None:
                    self._assign(actor)
            pending = {a.word: a for a in self.actors if a.word is not None}
            done, _ = ray.wait([*pending], timeout=5)
            for word in done:
                self._hear(pending[word], word)
            if done or any(a.ready for a in self.actors):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > START_SECONDS:
                raise ClientError("the Ray cluster has had no room for an actor; add a node")
            yield from self.board.ready()

    def close(self) -> None:
        """End the actors, and the cluster if it is ours."""
        import ray

        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor.handle)
            if self.own:
                ray.shutdown()
        self.actors = []

    def _start(self) -> "Actor":
        import ray

        gpus = 1 if self.options.device == "cuda" else 0
        made = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=0)
        handle = made.remote(*self.parts, self.options.device)
        return Actor(handle, handle.ready.remote())

    def _first_ready(self) -> None:
        import ray

        words = [a.word for a in self.actors]
        done, _ = ray.wait(words, timeout=START_SECONDS)
        if not done:
            raise ConfigError("the Ray cluster has no room for an actor; add a node or free cores")
        try:
            ray.get(done)
        except ray.exceptions.RayError as e:
            raise ConfigError(
                f"a Ray actor could not start ({_last_line(e)}); every node needs the same fedtorch "
                "and the modules of your own classes"
            ) from e

    def _assign(self, actor: "Actor") -> None:
        import ray

        job = self.board.take()
        if job is None:
            return
        if job.task is not self.task:
            weights = wire.pack(asking(job.task)).block()
            self.task, self.weights = job.task, ray.put(weights.numpy())
        memory = wire.encode(kit.memory_message(job.memory, job.ids))
        actor.job, actor.word = job, actor.handle.run.remote(self.weights, job.ids, memory, job.of)

    def _hear(self, actor: "Actor", word: Any) -> None:
        import ray

        job, actor.job, actor.word = actor.job, None, None
        try:
            said = ray.get(word)
        except ray.exceptions.RayError as e:  # the actor, its process or its node is gone
            self.actors[self.actors.index(actor)] = self._start()
            if job is not None:
                self.board.lost(job.number, _last_line(e))
            return
        actor.ready = True
        if job is None or job.number not in self.board.running:
            return
        if isinstance(said, str):
            self.board.clear()
            raise ClientError(said)
        # a copy: what Ray gives is read-only and lives in its store
        message = wire.decode(torch.from_numpy(said.copy()))
        self.board.done(job.number, read_outcome(message, job.ids))


@dataclass(eq=False)
class Actor:
    """This side of one actor; ``word`` is what it will say next."""

    handle: Any
    word: Any
    ready: bool = False
    job: Job | None = None


def installed() -> None:
    """Raise ConfigError where Ray is not."""
    # Ray reports usage to its makers unless told not to
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # noqa: F401
    except ImportError as e:
        raise ConfigError("engine ray needs Ray: pip install 'fedtorch[ray]'") from e


def connect(address: str, workers: int | None) -> bool:
    """Reach the cluster at ``address``, or start one; returns whether it is ours to end."""
    installed()
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "fedtorch"}
    if not address:
        path = {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}
        here = {"_node_ip_address": "127.0.0.1", "include_dashboard": False, "runtime_env": path}
        ray.init(num_cpus=workers or cores(), **here, **quiet)
        return True
    try:
        if address != "auto":  # Ray itself would try for minutes
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as e:
        raise ConfigError(f"there is no Ray cluster at {address!r}: {_last_line(e)}") from e
    return True


def by_value(part: object) -> bytes:
    """Pickle for another machine: classes of a script or of a model file go with it."""
    from ray import cloudpickle

    for name, module in [*sys.modules.items()]:
        if kit.loose(name):
            cloudpickle.register_pickle_by_value(module)
    return bytes(cloudpickle.dumps(part))


def _last_line(error: BaseException) -> str:
    return ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[
        -1
    ]
