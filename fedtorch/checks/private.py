"""Try one private step before training starts: what would void the claim is refused by name."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.checks.calls import Calls
from fedtorch.checks.held import draws_numbers
from fedtorch.checks.mixing import mixes as mixes_examples
from fedtorch.checks.probe import visit_alone
from fedtorch.checks.reached import forgets
from fedtorch.checks.tried import SOME, inputs, largest, normal_inputs, two_examples
from fedtorch.client import Client
from fedtorch.privacy import Privacy, models
from fedtorch.recipe import Recipe
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.module import snapshot, to, training
from fedtorch.training.outline import put_back, untouched
from fedtorch.tree import same
from fedtorch.types import ConfigError

VARIED = 6
"""Batches by which it is found out which parameters are used at all."""


def fits(
    model: nn.Module, clients: Sequence[Client], recipe: Recipe, alone: str | None = None
) -> None:
    """Raises ConfigError when model or loss would void the plan's claim, however it is trained.

    ``alone``: why examples are each collated alone, if they are (``checks.apart``).
    """
    if not recipe.privacy.claims:
        return
    models.refuse(model)
    models.narrow(model)
    if recipe.privacy.per_example:
        models.renorming(model)
    _frozen_buffers(model, clients, recipe)
    if recipe.privacy.per_example:
        _per_example(model, clients, recipe, alone)


def _per_example(
    model: nn.Module, clients: Sequence[Client], recipe: Recipe, alone: str | None
) -> None:
    """Each example must have a loss of its own, and what it adds must not hang on others."""
    data, name = largest(clients), type(model).__name__
    some = torch.arange(min(len_of(data), SOME)) if len_of(data) > 1 else torch.tensor([0, 0])
    batch = to(fetch(data, some), next(model.parameters()).device)
    _can_be_noised(model, batch, recipe)
    # no example is in another's
    if draws_numbers(model, batch, recipe, held=True):
        raise ConfigError(
            f"model {name} or its loss draws random numbers that no trial can hold still (torch.randperm, "
            "NumPy, a generator of its own), so that nothing shows that an example's result is its own: "
            "draw by torch.randn, rand, normal, bernoulli or randint, or in the dataset, or protect "
            "clients (privacy client)"
        )
    if alone:  # nothing is mixed, unless it is kept
        with torch.no_grad(), untouched(model), seeds.seeded(0):
            forgets(training(model), batch, recipe)
    elif why := mixes_examples(model, batch, recipe):
        if kind := _narrow(model, batch, recipe):
            raise ConfigError(
                f"model {name} or its loss computes in {kind} (torch.autocast, or a cast of its own), "
                "which rounds so much that nothing shows that an example's gradient is its own: compute in "
                "float32"
            )
        raise ConfigError(
            f"model {name} or its loss mixes the examples of a batch ({why}), so that "
            "clipping by example protects nobody: let each example have a result of its own (GroupNorm in "
            "place of BatchNorm, a loss of single examples), or protect clients (privacy client)"
        )


def _can_be_noised(model: nn.Module, batch: Any, recipe: Recipe) -> None:
    """Each example has a loss, and each parameter a gradient that noise can fall on."""
    with untouched(model), seeds.seeded(0):
        loss = recipe.losses(training(model), batch)
        if loss.dim() == 0:
            raise ConfigError(
                "sample-level privacy needs a loss with one number for each example, and this "
                f"{'loss' if recipe.step is None else 'step'} gives one for the whole batch: return "
                "one loss for each example (reduction='none')"
            )
        loss.sum().backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    sparse = [k for k, g in grads.items() if g is not None and g.is_sparse]
    if sparse:
        raise ConfigError(
            f"the gradient of parameter {sparse[0]} is sparse, and noise falls on every number: leave out "
            "sparse=True"
        )
    unused = [k for k, g in grads.items() if g is None]
    if unused and (unused := [k for k in unused if k not in _reached(model, batch, recipe)]):
        raise ConfigError(
            f"parameter {unused[0]} has no part in the loss of any example tried: call "
            "requires_grad_(False) on it, or it would be trained on noise alone (a part that is used by "
            "chance, as a layer skipped at random, needs privacy client)"
        )


class _Kinds(Calls):
    """Which types of half the digits or fewer are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **kwargs or {})
        self.found |= (
            {out.dtype} & {torch.float16, torch.bfloat16} if isinstance(out, Tensor) else set()
        )
        return out


def _narrow(model: nn.Module, batch: Any, recipe: Recipe) -> str:
    """The narrow type that something is computed in; nothing if there is none."""
    with untouched(model), seeds.seeded(0), _Kinds() as kinds:
        recipe.tried(training(model), batch)
    return " and ".join(sorted(str(k).removeprefix("torch.") for k in kinds.found))


def _reached(model: nn.Module, batch: Any, recipe: Recipe) -> set[str]:
    """Names of parameters that get a gradient from these examples, or from others of other numbers.

    Which expert of a mixture an example goes to hangs on its numbers.
    """
    found: set[str] = set()
    draw = seeds.generator(0, "experts")
    for k in range(VARIED):
        given = inputs(partial(normal_inputs, k, draw), batch) if k else batch
        with untouched(model), seeds.seeded(0):
            try:
                recipe.losses(training(model), given).sum().backward()
            except Exception:  # numbers that mean nothing to the model
                break
            found |= {n for n, p in model.named_parameters() if p.grad is not None}
    return found


def _frozen_buffers(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> None:
    """Buffers that follow the data would leave the client un-noised, or stay behind; weights, likewise."""
    batch = to(two_examples(largest(clients)), next(model.parameters()).device)
    before = snapshot(model)
    with torch.no_grad(), seeds.seeded(0):
        if recipe.local is None:
            recipe.tried(training(model), batch)
        else:
            client = max(clients, key=len)
            visit_alone(model, client, torch.tensor([0, len(client) - 1]), recipe)
    after = snapshot(model)
    put_back(model, before)
    for k, _ in model.named_buffers():
        if not bool(same(before[k], after[k]).all()):
            raise ConfigError(
                f"buffer {k} changes while training and nobody noises it: use a layer without "
                "statistics of the data or steps of its own (weight_norm in place of spectral_norm)"
            )
    if not recipe.privacy.per_example:
        return
    for k, _ in model.named_parameters():
        if not torch.equal(before[k], after[k]):
            raise ConfigError(
                f"parameter {k} is changed by the model's forward, past clipping and noise: change weights "
                "by their gradients alone"
            )


def warnings(clients: Sequence[Client], plan: Privacy) -> list[str]:
    """What a plan cannot do much for: very small clients, and a delta as large as one example in all."""
    if not (steps := plan.per_example):
        return []
    if plan.strict:  # how many examples anybody has is not said, nor whether it is few or many
        return [
            f"delta {plan.delta:g} lets one in {1 / plan.delta:,.0f} examples be exposed: it must be well "
            "below one over a client's examples, which strict leaves to you to compare"
        ]
    sizes = sorted((len(c), c.id) for c in clients)
    (least, who), (most, _) = sizes[0], sizes[-1]
    notes = []
    if least * steps.sample_rate < 1:
        notes.append(
            f"client {who} has {least} examples: at rate {steps.sample_rate:g} most of its batches are "
            "empty, and it adds noise more than it teaches"
        )
    if most * plan.delta > 1:
        notes.append(
            f"delta {plan.delta:g} lets one in {1 / plan.delta:,.0f} examples be exposed, and a client has "
            f"{most:,}: take a delta well below one over that"
        )
    return notes
