"""The baseline of every personal model: the shared one after some more steps on a client's own data."""

from collections.abc import Sequence
from dataclasses import replace

from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.server import Server
from fedtorch.training.local_update import local_update
from fedtorch.training.module import load, snapshot
from fedtorch.training.outline import copied
from fedtorch.types import Params, Task


def finetuned(server: Server, clients: Sequence[Client], steps: int) -> dict[str, Params]:
    """Each client's weights and buffers after ``steps`` local steps from the server's model, by id.

    By the run's optimizer, batch size and learning rate (under a privacy plan that of runs without one), on
    the client's own training examples; nothing is clipped, noised, sent or remembered.
    """
    model, found = copied(server.model), {}
    server.recipe.strategy.thaw(model)
    state = snapshot(model)
    plain = Recipe()
    asked = replace(
        server.recipe,
        strategy=plain.strategy,
        privacy=plain.privacy,
        aggregator=plain.aggregator,
        channel=(),
        steps=steps,
    )
    task = Task(state, {}, server.round_number, server.seed, asked.learning_rate)
    for client in clients:
        load(model, state)
        released, _ = local_update([client], task, asked, model)
        if released.ids:  # who comes to no finite weights stays with the shared ones
            change = {k: v[0] for k, v in released.sent["delta"].items()}
            moved = {k: (state[k].double() + d).to(state[k].dtype) for k, d in change.items()}
            floats = {k: v[0].to(state[k].dtype) for k, v in released.buffers.items()}
            found[client.id] = moved | floats
    return found
