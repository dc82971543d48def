"""Samplers and DataLoaders that clients came with, held to the recipe before training."""

from collections.abc import Sequence

import torch

from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.batches import Drawn, drawn
from fedtorch.types import ConfigError


def check(clients: Sequence[Client], recipe: Recipe) -> list[str]:
    """What is to be said of samplers and loaders; raises ConfigError naming a client and the fix."""
    for client in clients:
        if client.sampler is not None:
            _draws(client, client.sampler, recipe)
    if recipe.privacy.per_example:  # the plan draws the batches, and says so
        return []
    for client in clients:
        if client.loader is not None:
            _agrees(client, recipe)
    kept = [c.id for c in clients if c.loader and not (c.loader.shuffled or c.sampler)]
    if not kept:
        return []
    more = f", as of {len(kept) - 1} more," if len(kept) > 1 else ""
    return [
        f"the DataLoader of client {kept[0]}{more} does not shuffle, but here each pass does (to keep "
        "the order: sampler=lambda seed, round: range(n))"
    ]


def _draws(client: Client, sampler: Drawn, recipe: Recipe) -> None:
    if recipe.privacy.per_example:
        raise ConfigError(
            f"client {client.id} has a sampler, but sample-level privacy draws the batches itself (its "
            "epsilon holds for those alone): leave the sampler out, or protect clients (privacy client)"
        )
    try:
        found = [drawn(sampler, len(client), 0, 0) for _ in range(2)]
    except Exception as e:
        what = (
            str(e) if isinstance(e, ValueError) else f"its sampler fails: {type(e).__name__}: {e}"
        )
        raise ConfigError(f"client {client.id}: {what}") from e
    if not torch.equal(*found):
        raise ConfigError(
            f"client {client.id}: its sampler gives other places when asked again with the same seed, so "
            "that no run could be repeated: draw from the seed, or leave out its own generator"
        )


def _agrees(client: Client, recipe: Recipe) -> None:
    """The recipe decides how batches are cut, for all clients."""
    assert client.loader is not None
    own, n = client.loader, len(client)
    size = recipe.batch_size or n
    if own.batch_size != size and min(own.batch_size, size) < n:
        raise ConfigError(
            f"client {client.id}: its DataLoader has batch_size {own.batch_size}, and the recipe "
            f"{recipe.batch_size}: give Recipe(batch_size={own.batch_size}), or the dataset alone "
            "(loader.dataset)"
        )
    if own.drop_last != recipe.drop_last and n % own.batch_size:
        raise ConfigError(
            f"client {client.id}: its DataLoader has drop_last={own.drop_last}, and the recipe "
            f"{recipe.drop_last}: give Recipe(drop_last={own.drop_last}), or the dataset alone "
            "(loader.dataset)"
        )
