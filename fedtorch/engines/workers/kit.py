"""What a worker on this side of the wall needs: the model, the recipe and every client's data.

It is pickled, because it goes from this process to workers that it started itself; messages from
anywhere else never are. Data held as tensors travels in one flat block that all workers of a machine map.
"""

import copy
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedtorch.client import Client
from fedtorch.engines import wire
from fedtorch.engines.messages import Memory, Outcome
from fedtorch.options import run_file
from fedtorch.recipe import Recipe
from fedtorch.training.local_update import local_update
from fedtorch.training.module import snapshot
from fedtorch.training.personal import given
from fedtorch.training.reserve import Reserve
from fedtorch.training.stacked import Solver
from fedtorch.training.together import Joins, local_updates
from fedtorch.types import ConfigError, Params, Task, Tasks


@dataclass
class Kit:
    """A working model and the clients, inside a worker."""

    model: nn.Module
    recipe: Recipe
    clients: dict[str, Client]
    solver: Solver

    def __post_init__(self) -> None:
        """Keep what does not travel."""
        self.reserve = Reserve()
        self.given = given(self.model, self.recipe.strategy.personal)

    def run(
        self, task: Task | Tasks, ids: Sequence[str], memory: Memory, of: Sequence[int] = ()
    ) -> Outcome:
        """Train one chunk; memory comes with it and goes back, so that any worker can do it.

        ``of``: where there are several tasks, the place of each client's.
        """
        clients = [self.clients[i] for i in ids]
        for client in clients:
            client.memory = memory.get(client.id, {})
        task, recipe = task.filled(self.given), self.recipe
        if isinstance(task, Tasks):
            visits, solver = [*zip(clients, of, strict=True)], cast(Joins, self.solver)
            update, failures = local_updates(visits, task, recipe, self.model, solver)
        else:
            update, failures = local_update(
                clients, task, recipe, self.model, self.solver, self.reserve
            )
        kept = {c.id: c.memory for c in clients if c.id in update.ids and c.memory}
        for client in clients:
            client.memory = {}
        return Outcome(update, failures, kept)


def pack(
    model: nn.Module,
    clients: Sequence[Client],
    recipe: Recipe,
    solver: Solver,
    dumps: Callable[[object], bytes] = pickle.dumps,
) -> tuple[bytes, wire.Packed]:
    """The pickled part and the block of data; raises ConfigError naming what cannot be pickled."""
    bare = [_bare(c) for c in clients]
    tables = {
        str(k): {str(i): t for i, t in enumerate(c.data.tensors)}
        for k, c in enumerate(clients)
        if isinstance(c.data, TensorDataset)
    }
    odd = [
        (n, t.dtype)
        for n, t in (
            *snapshot(model).items(),
            *(row for table in tables.values() for row in table.items()),
        )
        if t.dtype not in wire.DTYPES.values()
    ]
    if odd:
        name, dtype = odd[0]
        raise ConfigError(
            f"{name} (of the model, or of a client's data) is {dtype}, which cannot be sent to a worker "
            "process: convert it, or use engine local"
        )
    parts = {
        f"model {type(model).__name__}": model,
        "the recipe (strategy, loss or step, optimizer)": recipe,
        "a client's dataset, collate or sampler": bare,
    }
    for what, part in parts.items():
        try:
            dumps(part)
        except Exception as e:
            why = str(e).partition("\n")[0]
            raise ConfigError(
                f"{what} cannot be sent to a worker process: {why}; define its classes and functions at "
                "the top level of a module, or use engine local"
            ) from e
    body = pickle.dumps((_loose_modules(model, recipe), dumps((model, recipe, bare, solver))))
    return body, wire.pack(wire.Message("data", groups=tables))


def unpack(body: bytes, block: Tensor, device: str) -> Kit:
    """The kit in a worker; ``block`` (uint8) stays where it is."""
    modules, inner = pickle.loads(body)
    for name, path in modules:
        if Path(path).is_file():
            run_file(name, Path(path))
    model, recipe, clients, solver = pickle.loads(inner)
    for k, table in wire.decode(block).groups.items():
        clients[int(k)].data = TensorDataset(*(table[str(i)] for i in range(len(table))))
    return Kit(model.to(device), recipe, {c.id: c for c in clients}, solver)


def memory_message(memory: Memory, asked: Sequence[str]) -> wire.Message:
    """Client memory on its way to a worker; clients go by their place in ``asked``."""
    groups: dict[str, Params] = {}
    for k, id in enumerate(asked):
        groups |= {f"{k}/{g}": tree for g, tree in memory.get(id, {}).items()}
    return wire.Message("memory", groups=groups)


def read_memory(message: wire.Message, asked: Sequence[str]) -> Memory:
    """The other way round."""
    memory: Memory = {}
    for group, tree in message.groups.items():
        place, _, name = group.partition("/")
        memory.setdefault(asked[int(place)], {})[name] = tree
    return memory


def _bare(client: Client) -> Client:
    bare = copy.copy(client)
    bare.validation, bare.loader, bare.memory = None, None, {}
    if isinstance(client.data, TensorDataset):
        bare.data = TensorDataset(torch.empty(0))
    return bare


def _loose_modules(model: nn.Module, recipe: Recipe) -> list[tuple[str, str]]:
    # a model file of the zoo is a module that no import statement would find: send where it is
    owners = {type(m).__module__ for m in model.modules()}
    own = recipe.loss, recipe.step, recipe.local, recipe.scheduler, recipe.client_optimizer.name
    # of a partial, its own
    owners |= {getattr(getattr(f, "func", f), "__module__", "") for f in own}
    owners |= {
        type(part).__module__ for part in (recipe.strategy, recipe.aggregator, *recipe.channel)
    }
    found = {n: getattr(sys.modules.get(n), "__file__", None) for n in sorted(owners) if loose(n)}
    return [(name, path) for name, path in found.items() if path]


def loose(name: str) -> bool:
    """Whether a module was read from a model file, and so cannot be imported by name."""
    return name.startswith("fedtorch_model_")
