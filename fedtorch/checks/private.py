"""Try one private step before training starts: what would void the claim is refused by name."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.checks.held import alike
from fedtorch.checks.mixing import inputs
from fedtorch.checks.mixing import mixes as mixes_examples
from fedtorch.checks.probe import visit_alone
from fedtorch.checks.reached import kept
from fedtorch.checks.stacking import uneven
from fedtorch.checks.tried import two_examples
from fedtorch.client import Client
from fedtorch.privacy import Privacy, models
from fedtorch.privacy.gradients import PrivateSteps, private_gradients, stacked_gradients
from fedtorch.privacy.noise.streams import stream
from fedtorch.recipe import Recipe
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.local_steps import one_by_one
from fedtorch.training.module import training, undropped
from fedtorch.training.outline import put_back, untouched
from fedtorch.training.stacked import snapshot, to
from fedtorch.training.step import Stepping
from fedtorch.tree import expand, leaves, mapped, rows, same, size
from fedtorch.types import ConfigError

SIDE_BY_SIDE = 8
"""Clients from which on stacking them beats Opacus (small models); measured in benchmarks/privacy.py."""


SOME = 16
"""Examples by which it is found out if they are mixed."""

VARIED = 6
"""Batches by which it is found out which parameters are used at all."""

TOLERANCE = 5e-3
"""How far a mode may be from the truth, in clipping norms; a wrong one is far beyond."""


MISSED = 1e-4
"""Share of the gradients of examples that a mode may leave out of their sum."""

UNCLIPPED = 1e12


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


def with_mode(
    model: nn.Module,
    clients: Sequence[Client],
    recipe: Recipe,
    chunk: int,
    alone: str | None = None,
) -> tuple[Recipe, int]:
    """The recipe with the way to per-example gradients chosen, and clients side by side.

    For training without the fast path, which is tried for itself. Raises ConfigError where there is none.
    """
    plan = recipe.privacy.per_example
    if not plan:
        return recipe, chunk
    mode: str = plan.mode
    if alone:
        if mode not in ("auto", "alone"):
            raise ConfigError(f"privacy.mode {mode} cannot train: {alone}; take mode alone")
        mode = "alone"
    elif mode == "auto":
        small = chunk >= SIDE_BY_SIDE and stacks(model, clients, recipe)
        mode = (
            "stacked"
            if small
            else _first(model, clients, recipe, ("ghost", "hooks", "stacked", "alone"))
        )
    elif why := _works(model, clients, recipe, mode):
        raise ConfigError(
            f"privacy.mode {mode} cannot train model {type(model).__name__}: {why}; try another mode"
            f"{models.FIX}"
        )
    chunk = chunk if mode == "stacked" else 1
    return replace(recipe, privacy=plan.by(mode)), chunk


def stacks(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> bool:
    """Whether private steps may be taken with clients side by side."""
    private = recipe.privacy.per_example
    return not private or _works(model, clients, recipe, "stacked") is None


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
        f"model {type(model).__name__} gives no per-example gradients ({'; '.join(whys)}){models.FIX}"
    )


def _works(model: nn.Module, clients: Sequence[Client], recipe: Recipe, mode: str) -> str | None:
    """Why one step in this mode fails, or None."""
    if mode == "stacked" and (why := one_by_one(recipe)):
        return why
    if mode == "ghost" and (name := models.tied(model)):
        return f"parameter {name} is shared by two layers, which ghost clipping cannot see"
    batch = to(two_examples(_largest(clients)), next(model.parameters()).device)
    if mode == "stacked" and (why := uneven(batch)):
        return why
    draws = _draws(model, batch, recipe)
    if mode == "stacked" and draws:
        return "it draws random numbers other than by dropout"
    before = snapshot(model)
    training(model)
    if mode == "ghost" and (name := _over_sequences(model, batch, recipe)):
        put_back(model, before)
        return (
            f"layer {name} sees several rows of an example, whose gradient has to be written out for its "
            "norm: that is mode hooks"
        )
    try:
        wrong = _misses(model, batch, recipe, mode)
        if mode == "alone" and draws:  # each example has numbers of its own
            return None
        wrong = wrong or any(
            _differs(model, b, recipe, mode) for b in (batch, _varied(model, clients, recipe))
        )
    except Exception as e:
        return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
    finally:
        training(model)
        model.zero_grad()
        put_back(model, before)
    if wrong:
        return (
            "its clipped gradients differ from those of the examples one by one (a weight used outside "
            "its layer, as by a penalty, or an option of a layer that Opacus does not know)"
        )
    return None


def _differs(model: nn.Module, batch: Any, recipe: Recipe, mode: str) -> bool:
    """Whether the sum of a batch's gradients is not that of its examples' one by one."""
    with undropped(model):
        alone = [_alone(model, batch, k, recipe) for k in range(size(batch))]
        alone = [a for a in alone if bool(a.isfinite().all())]
        clip = min((float(a.norm()) for a in alone if bool(a.any())), default=2.0) / 2
        want = sum(a * (clip / a.norm().clamp(min=clip)) for a in alone)
        with alike(size(batch)):
            got = _one_step(model, batch, recipe, mode, clip)
        return not (got - want).norm() <= TOLERANCE * clip


def _misses(model: nn.Module, batch: Any, recipe: Recipe, mode: str) -> bool:
    """Take a step as it trains, nothing held still; whether what hooks see is not the whole gradient.

    Of a compiled model they may see nothing, and of a penalty on weights never anything.
    """
    found = _one_step(model, batch, recipe, mode, UNCLIPPED)
    if mode not in ("hooks", "ghost"):
        return False
    model.zero_grad()
    with seeds.seeded(0):
        recipe.losses(model, batch).sum().backward()
    whole = _gradients(model)
    alone = [_alone(model, batch, k, recipe).norm() for k in range(size(batch))]
    most = MISSED if whole.device.type == "cpu" else TOLERANCE
    return bool(whole.isfinite().all()) and not (found - whole).norm() <= most * sum(alone)


def _varied(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> Any:
    """More examples, of other numbers where the model takes them: an expert is given a part of them."""
    data = _largest(clients)
    many = torch.arange(SOME // 2) % len_of(data)
    batch = to(fetch(data, many), next(model.parameters()).device)
    other = inputs(partial(_noise, 1.0, seeds.generator(0, "experts")), batch)
    try:
        with torch.no_grad(), seeds.seeded(0):
            return other if bool(recipe.tried(model, other).isfinite().all()) else batch
    except Exception:  # numbers that mean nothing to the model
        return batch


def _over_sequences(model: nn.Module, batch: Any, recipe: Recipe) -> str | None:
    """Name of a linear layer that sees more than one row of each example, if there is one."""
    found: list[str] = []

    def look(name: str, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].dim() > 2:
            found.append(name)

    hooks = [
        m.register_forward_pre_hook(lambda _, inputs, n=n: look(n, inputs))
        for n, m in model.named_modules()
        if type(m) is nn.Linear  # what Opacus has this formula for
    ]
    try:
        with torch.no_grad(), seeds.seeded(0):
            recipe.tried(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _alone(model: nn.Module, batch: Any, k: int, recipe: Recipe) -> Tensor:
    """One example's gradient without any machinery, flat: what every mode is held to."""
    model.zero_grad()
    with seeds.seeded(0), alike(1):
        recipe.losses(model, rows(batch, slice(k, k + 1))).sum().backward()
    return _gradients(model)


def _one_step(model: nn.Module, batch: Any, recipe: Recipe, mode: str, clip: float) -> Tensor:
    """The sum of clipped gradients in ``mode``, flat, without noise."""
    steps = PrivateSteps(clip, 0.0, 1.0, [stream("aes", 0, "probe")], mode)
    model.zero_grad()
    with seeds.seeded(0):
        if mode != "stacked":
            with private_gradients(model, recipe.losses, steps) as gradients:
                gradients.backward(batch)
            return _gradients(model)
        state = snapshot(model)
        names = [k for k, p in model.named_parameters() if p.requires_grad]
        params = expand({k: state[k] for k in names})
        rest = expand({k: v for k, v in state.items() if k not in params})
        batch = mapped(lambda t: t[None], batch)
        mask = torch.ones(
            1, len(leaves(batch)[0][0]), dtype=torch.bool, device=leaves(batch)[0].device
        )
        stepping = Stepping(model, recipe.asked)
        grads, _ = stacked_gradients(stepping, params, rest, batch, mask, steps)
        return torch.cat([grads[k].flatten() for k in names]).double()


def _gradients(model: nn.Module) -> Tensor:
    # a weight an example does not reach (an expert not chosen) has no gradient rather than zeros
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad.detach()).flatten().double()
            for p in model.parameters()
            if p.requires_grad
        ]
    )


def _per_example(
    model: nn.Module, clients: Sequence[Client], recipe: Recipe, alone: str | None
) -> None:
    """Each example must have a loss of its own, and each parameter a gradient."""
    data, name = _largest(clients), type(model).__name__
    some = torch.arange(min(len_of(data), SOME)) if len_of(data) > 1 else torch.tensor([0, 0])
    batch = to(fetch(data, some), next(model.parameters()).device)
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
            "requires_grad_(False) on it, or it would be trained on noise alone"
        )
    if _draws(model, batch, recipe, held=True):
        raise ConfigError(
            f"model {name} or its loss draws random numbers that no trial can hold still (torch.randperm, "
            "NumPy, a generator of its own), so that nothing shows that an example's result is its own: "
            "draw by torch.randn, rand, normal, bernoulli or randint, or in the dataset, or protect "
            "clients (privacy client)"
        )
    if alone:  # nothing is mixed, unless it is kept
        with torch.no_grad(), untouched(model), seeds.seeded(0):
            kept(training(model), batch, recipe)
    elif why := mixes_examples(model, batch, recipe):
        raise ConfigError(
            f"model {name} or its loss mixes the examples of a batch ({why}), so that "
            "clipping by example protects nobody"
        )


def _draws(model: nn.Module, batch: Any, recipe: Recipe, held: bool = False) -> bool:
    """Whether losses differ from call to call when nothing is dropped, or with what is drawn ``held``."""
    losses = []
    with untouched(model), torch.no_grad(), undropped(model):
        for seed in (0, 1):
            with seeds.seeded(seed), alike(size(batch)) if held else nullcontext():
                losses.append(recipe.tried(model, batch))
    return not torch.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-6, equal_nan=True)


def _reached(model: nn.Module, batch: Any, recipe: Recipe) -> set[str]:
    """Names of parameters that get a gradient from these examples, or from others of other numbers.

    Which expert of a mixture an example goes to hangs on its numbers.
    """
    found: set[str] = set()
    draw = seeds.generator(0, "experts")
    for k in range(VARIED):
        given = inputs(partial(_noise, k, draw), batch) if k else batch
        with untouched(model), seeds.seeded(0):
            try:
                recipe.losses(training(model), given).sum().backward()
            except Exception:  # numbers that mean nothing to the model
                break
            found |= {n for n, p in model.named_parameters() if p.grad is not None}
    return found


def _noise(scale: float, draw: torch.Generator, like: Tensor) -> Tensor:
    if not like.is_floating_point():
        return like
    return torch.randn(like.shape, generator=draw).to(like) * scale


def _largest(clients: Sequence[Client]) -> Dataset:
    # twice the only example of a small client would hide that examples are mixed
    return max(clients, key=len).data


def _frozen_buffers(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> None:
    """Buffers that follow the data would leave the client un-noised, or stay behind; weights, likewise."""
    batch = to(two_examples(_largest(clients)), next(model.parameters()).device)
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
                "statistics of the data"
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
