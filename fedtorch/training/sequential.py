"""Trains clients one at a time in one module and keeps only the running weighted sum of their changes.

What a visit costs beside its steps is paid once for all of them, and K updates are never held at once.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.client import Client
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.recipe import Recipe
from fedtorch.training.reserve import Reserve
from fedtorch.training.results import RunningSum, Summed, bounded
from fedtorch.training.trainee import Trainee
from fedtorch.tree import add_weighted, expand, moving, near, settled
from fedtorch.types import ClientError, Context, Params, Task


def train_sequentially(
    clients: Sequence[Client],
    order: Sequence[Tensor],
    ctx: Context,
    task: Task,
    recipe: Recipe,
    model: nn.Module,
    private: PrivateSteps | None,
    reserve: Reserve,
) -> Summed:
    """Train each client from the global weights as if it were alone, and sum what they learned.

    ``reserve``: where the sum may lie. Raises ValueError where ``recipe.needs_rows``, or clients remember
    their own change: a sum does not show each client's.
    """
    if recipe.needs_rows or recipe.strategy.confirms:
        raise ValueError("clients whose updates are needed one by one train one at a time")
    # one model for all, and an empty sum
    privacy, trainee = recipe.privacy, Trainee(model, task, recipe)
    start = {k: task.state[k] for k in trainee.params}
    total, floats = RunningSum(near(start), reserve), Params()
    examples = torch.tensor([float(len(c)) for c in clients])
    weight = recipe.weights(examples)
    share = (weight.double() / weight.sum()).tolist()
    measured = privacy.shortens or recipe.strategy.measures
    loss, squares, counted, used, moved = [], [], [], [], set[str]()
    with seeds.kept():
        for k, client in enumerate(clients):
            # one visit
            seeds.set_global(privacy.draw_seed(task, client.id))
            noise = private and replace(private, streams=private.streams[k : k + 1])
            alone = ctx.of(k)
            with naming_client([client.id], task):
                loss.append(trainee.visit(client.data, order[k], alone, noise))
            # what it changed, scaled by the plan, goes into the sum
            weights = near(trainee.weights())
            buffers = expand(near(trainee.floats())) if privacy.statistics else {}
            sound = not buffers or bool(settled(buffers, task.state))
            at_once = sound and not measured and share[k] > 0 and bounded(weights)
            squares.append(total.take(weights, share[k]) if at_once else total.see(weights))
            if not sound:
                squares[k] = math.nan
            fine, part, scale = math.isfinite(squares[k]), 1.0, 1.0
            if fine and measured:
                norm = total.bound(_float64(squares[k:])).sqrt()
                part, scale = _factors(recipe, alone, norm, examples[k : k + 1], task)
            counted.append(share[k] * part if fine else 0.0)
            used.append(counted[k] * scale)
            if counted[k] and not at_once:
                total.add(used[k])
            if counted[k] and buffers:
                add_weighted(floats, buffers, _float64(counted[k:]))
                moved |= moving(buffers, task.state).keys()
    # the sum, and what is told of each
    trainee.put_back()
    floats = {k: v for k, v in floats.items() if k in moved}
    both = _float64(used), _float64(counted)
    return Summed(torch.stack(loss), _float64(squares), *both, total, floats)


def _factors(
    recipe: Recipe, ctx: Context, norm: Tensor, examples: Tensor, task: Task
) -> tuple[float, float]:
    """What a change of this length is multiplied by, for the plan and then for the strategy."""
    part = float(recipe.privacy.scale(norm, examples, task))
    scale = recipe.strategy.scale(ctx, norm) if part else None
    return part, 1.0 if scale is None else float(scale)


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@contextmanager
def naming_client(ids: Sequence[str], task: Task) -> Iterator[None]:
    """An error of the clients' own code names them."""
    try:
        yield
    except ClientError:  # names one of them
        raise
    except Exception as e:
        who = f"client {ids[0]}" if len(ids) == 1 else f"{len(ids)} clients"
        raise ClientError(f"{who}, round {task.round}: {type(e).__name__}: {e}") from e
