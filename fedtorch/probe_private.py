"""Try one private step before training starts: what would void the claim is refused by name."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.client import Client, Recipe
from fedtorch.losses import reduce
from fedtorch.privacy import SampleLevel, checks
from fedtorch.privacy.gradients import PrivateSteps, opacus_gradients, stacked_gradients
from fedtorch.privacy.streams import stream
from fedtorch.probe import mixes_examples, put_back, two_examples
from fedtorch.solvers import forward, snapshot, to
from fedtorch.tree import expand
from fedtorch.types import ConfigError

SIDE_BY_SIDE = 8
"""Clients from which on stacking them beats Opacus (small models); measured in benchmarks/privacy.py."""


def fits(
    model: nn.Module, clients: Sequence[Client], recipe: Recipe, chunk: int
) -> tuple[Recipe, int]:
    """The recipe with the way to per-example gradients chosen, and clients side by side.

    Raises ConfigError when model or loss would void the plan's claim.
    """
    plan = recipe.privacy
    if plan is None:
        return recipe, chunk
    checks.refuse(model)
    _frozen_buffers(model, clients, recipe)
    if not isinstance(plan, SampleLevel):
        return recipe, chunk
    _per_example(model, clients, recipe)
    mode: str = plan.mode
    if mode == "auto":
        small = chunk >= SIDE_BY_SIDE and _works(model, clients, recipe, "stacked") is None
        mode = "stacked" if small else _first(model, clients, recipe, ("ghost", "hooks", "stacked"))
    elif why := _works(model, clients, recipe, mode):
        raise ConfigError(
            f"privacy.mode {mode} cannot train model {type(model).__name__}: {why}; try another mode"
            f"{checks.FIX}"
        )
    chunk = chunk if mode == "stacked" else 1
    return replace(recipe, privacy=replace(plan, mode=cast(Any, mode))), chunk


def _first(
    model: nn.Module, clients: Sequence[Client], recipe: Recipe, modes: Sequence[str]
) -> str:
    whys = []
    for mode in modes:
        why = _works(model, clients, recipe, mode)
        if why is None:
            return mode
        whys.append(f"{mode}: {why}")
    raise ConfigError(
        f"model {type(model).__name__} gives no per-example gradients ({'; '.join(whys)}){checks.FIX}"
    )


def _works(model: nn.Module, clients: Sequence[Client], recipe: Recipe, mode: str) -> str | None:
    """Why one step in this mode fails, or None."""
    if mode == "ghost" and (name := checks.tied(model)):
        return f"parameter {name} is shared by two layers, which ghost clipping cannot see"
    x, y = to(two_examples(clients[0].data), next(model.parameters()).device)
    if mode == "stacked" and not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return "the data is not a plain pair of tensors (x, y)"
    steps = PrivateSteps(1.0, 0.0, 1.0, [stream("torch", 0, "probe")], mode)
    before = snapshot(model)
    model.train()
    try:
        with seeds.seeded(0):
            if mode == "stacked":
                names = {k for k, p in model.named_parameters() if p.requires_grad}
                params = expand({k: v for k, v in before.items() if k in names})
                rest = expand({k: v for k, v in before.items() if k not in names})
                mask = torch.ones(1, len(y), dtype=torch.bool, device=y.device)
                stacked_gradients(model, recipe.loss, params, rest, (x[None], y[None], mask), steps)
            else:
                with opacus_gradients(model, recipe.loss, steps, forward) as gradients:
                    gradients.backward(x, y)
    except Exception as e:
        return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    finally:
        model.zero_grad()
        put_back(model, before)
    return None


def _per_example(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> None:
    """Each example must have a loss of its own, and each parameter a gradient."""
    data = clients[0].data
    x, y = to(two_examples(data), next(model.parameters()).device)
    before = snapshot(model)
    with seeds.seeded(0):
        loss = reduce(recipe.loss(forward(model.train(), x), y))
        if loss.dim() == 0:
            raise ConfigError(
                "sample-level privacy needs a loss with one number for each example "
                "(reduction='none'); this loss gives one for the whole batch"
            )
        loss.sum().backward()
    unused = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    put_back(model, before)
    if unused:
        raise ConfigError(
            f"parameter {unused[0]} is not used by the model's forward: call requires_grad_(False) "
            "on it, or it would be trained on noise alone"
        )
    if mixes_examples(model, data, recipe):
        raise ConfigError(
            f"model {type(model).__name__} or its loss mixes the examples of a batch (one example's "
            "result depends on its neighbours), so that clipping by example protects nobody"
        )


def _frozen_buffers(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> None:
    """Buffers that follow the data would leave the client un-noised, or stay behind the weights."""
    x, _ = to(two_examples(clients[0].data), next(model.parameters()).device)
    before = snapshot(model)
    with torch.no_grad(), seeds.seeded(0):
        forward(model.train(), x)
    after = snapshot(model)
    put_back(model, before)
    for k, _ in model.named_buffers():
        if not torch.equal(before[k], after[k]):
            raise ConfigError(
                f"buffer {k} changes while training and nobody noises it: use a layer without "
                "statistics of the data"
            )
