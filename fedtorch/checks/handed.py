"""What a server is handed: clients with names of their own, and a model that stays the one they copied."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fedtorch.options import shown
from fedtorch.recipe import Recipe
from fedtorch.types import ConfigError, Params


def names(clients: Sequence[Any]) -> list[str]:
    """The clients' ids; raises ConfigError where there are none, or where one is there twice."""
    if odd := [c for c in clients if not hasattr(c, "id")]:
        raise ConfigError(f"each of the clients must be a Client, got {shown(odd[0])}")
    if not clients:
        raise ConfigError("there are no clients")
    ids = [c.id for c in clients]
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        raise ConfigError(f"client ids must differ, but {twice[0]!r} is there twice")
    return ids


def parameters(model: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    """Shape of each parameter, and whether it is trained."""
    return {k: (p.shape, p.requires_grad) for k, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, tuple[torch.Size, bool]]) -> None:
    """Refuse a model whose parameters are no longer those that the engine was given a copy of."""
    now = parameters(model)
    if now == before:
        return
    name = next(k for k in {**before, **now} if now.get(k) != before.get(k))
    was, what = before.get(name), now.get(name)
    how = "is new" if was is None else "is gone" if what is None else "has another shape"
    if was and what and was[0] == what[0]:
        how = "was unfrozen" if what[1] else "was frozen"
    raise ConfigError(
        f"parameter {name} of server.model {how} after Server() was made, and clients still train "
        "the model as it was then: make a new Server with the changed model"
    )


def same_shapes(own: Params, other: Params) -> None:
    """Refuse the weights of another model."""
    for k in {**own, **other}:
        if k not in own or k not in other or own[k].shape != other[k].shape:
            raise ConfigError(f"the checkpoint is of another model: {k!r} does not match")


def notes(model: nn.Module, recipe: Recipe, sent: dict[str, Params], clients: int) -> list[str]:
    """What is to be said of model and recipe; ``sent``: what a client sends, in names and shapes."""
    found = []
    lightning = hasattr(model, "training_step") and hasattr(model, "configure_optimizers")
    if lightning and recipe.step is None and recipe.local is None:
        found.append(
            f"training_step and configure_optimizers of model {type(model).__name__} are not used: "
            "clients train its forward by the recipe's loss and optimizer (docs/own.md: A step of your own)"
        )
    if recipe.privacy.fix_model:
        found.append(
            "privacy.fix_model: server.model is a copy, without the layers that void the guarantee"
        )
    if recipe.strategy.personal:
        found.append(
            "strategy.personal: each client keeps weights of its own; server.model has the shared ones "
            "and those that clients start with, and a client's own model is server.model_of(id)"
        )
    elif recipe.strategy.keeps:
        found.append(
            "each client keeps a model of its own, server.model_of(id); server.model is the shared one"
        )
    if not recipe.aggregator.linear:
        each = sum(v.numel() * v.element_size() for p in sent.values() for v in p.values())
        found.append(
            f"{type(recipe.aggregator).__name__} keeps every client's update until the round ends: up to "
            f"{clients * each / 1e6:,.1f} MB"
        )
    return found
