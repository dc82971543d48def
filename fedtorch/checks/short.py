"""Batches of every size that a run will meet, tried before it: the last of a pass is shorter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedtorch import seeds
from fedtorch.checks.tried import first
from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.batches import Collated, fetch, least, len_of
from fedtorch.training.module import to, training
from fedtorch.training.outline import untouched
from fedtorch.tree import mapped, rows
from fedtorch.types import ConfigError

FEW = 16
"""Examples of a client that its batches are made of, as far as they go."""

DRAWS = 8
"""Batches of one size that are tried at most."""

MOST_TRIED = 256
"""Examples after which no more sizes are tried, the smallest first."""


def batches(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> None:
    """Raises ConfigError naming a client with batches on which model or loss fails, or gives no number.

    A loss that is no number for the larger batch as well is a matter of the data, not of the size.
    """
    if recipe.privacy.per_example or recipe.local:  # batches drawn by chance; losses nobody knows
        return
    spent = 0
    for size, those in sorted(_sizes(clients, recipe).items()):
        if spent and spent + size > MOST_TRIED:
            return
        spent += size * _draws(size)
        with untouched(model), torch.no_grad(), seeds.seeded(0):
            if why := _fails(training(model), those[0], recipe, size):
                raise ConfigError(_sentence(model, those, recipe, size, why))


def _sizes(clients: Sequence[Client], recipe: Recipe) -> dict[int, list[Client]]:
    """Sizes of batches, and who has them."""
    found: dict[int, list[Client]] = {}
    for c in clients:
        n = c.taken()  # a sampler's first stand for all
        for size in {min(recipe.batch_size or n, n), least(n, recipe)}:
            found.setdefault(size, []).append(c)
    return found


def _draws(size: int) -> int:
    return max(1, min(DRAWS, 4 * FEW // size))


def _fails(model: nn.Module, client: Client, recipe: Recipe, size: int) -> str | None:
    """What goes wrong with a batch of so many, if anything."""
    n = len(client)
    many = max(min(n, max(FEW, size)), 2)  # twice the only example of a client that has one
    given = torch.arange(many) % min(n, len_of(client.data))
    device = next(model.parameters()).device
    try:
        batch = to(fetch(client.data, given), device)
    except Exception as e:  # the owner's own code, for an example that was not asked for before
        raise ConfigError(
            f"client {client.id}: taking a batch of its dataset failed: {type(e).__name__}: {first(e)}"
        ) from e
    order = torch.randperm(many, generator=seeds.generator(0, "short", size))
    for k in range(_draws(size)):
        index = order.roll(-k * size)[:size]
        try:
            own = isinstance(client.data, Collated)  # rows of such a batch may be no batch
            few = to(fetch(client.data, given[index]), device) if own else rows(batch, index)
            loss = recipe.tried(model, few)
        except Exception as e:
            return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:300]}"
        if loss.dim() and len(loss) != size:
            return f"the loss gives {list(loss.shape)}"
        if not bool(loss.isfinite().all()) and _sound(model, batch, recipe):
            return f"the loss is {float(loss.mean())}, which it is not for {many}"
    return None


def _sound(model: nn.Module, batch: Any, recipe: Recipe) -> bool:
    """Whether the same examples have a loss together."""
    try:
        return bool(recipe.tried(model, mapped(torch.clone, batch)).isfinite().all())
    except Exception:  # more than a batch, for a model of one size
        return False


def _sentence(
    model: nn.Module, those: Sequence[Client], recipe: Recipe, size: int, why: str
) -> str:
    client, others = those[0], len(those) - 1
    n, words = len(client), "one example" if size == 1 else f"{size} examples"
    fix = "leave out the last, smaller batch (drop_last), or take another batch_size"
    if n == size:
        fix = "leave that client out"
    elif size == recipe.batch_size:
        fix = "take a larger batch_size"
    if size == 1 and "[]" in why:
        fix = (
            f"write squeeze(-1) for squeeze(), which drops the axis of a batch of one too, or {fix}"
        )
    return (
        f"client {client.id} has a batch of {words} ({n} examples, batch_size {recipe.batch_size})"
        f"{f', as have {others} more' if others else ''}, and model {type(model).__name__} or its loss "
        f"cannot train on {'one' if size == 1 else 'so few'} ({why}): {fix}"
    )
