"""Which way to per-example gradients trains this model: each is held to its examples one by one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.checks.crossing import crosses
from fedtorch.checks.gates import behind
from fedtorch.checks.held import draws_numbers, same_draws
from fedtorch.checks.picks import picks
from fedtorch.checks.reached import leaves as graph_leaves
from fedtorch.checks.stacking import uneven
from fedtorch.checks.tried import SOME, first, inputs, largest, normal_inputs, two_examples
from fedtorch.client import Client
from fedtorch.privacy import models
from fedtorch.privacy.gradients import PrivateSteps, stacked_gradients
from fedtorch.privacy.layer_gradients import OWN
from fedtorch.privacy.noise.streams import stream
from fedtorch.privacy.own_parameters import own_parameters
from fedtorch.recipe import Recipe
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.local_steps import one_by_one
from fedtorch.training.module import snapshot, to, training, undropped
from fedtorch.training.outline import untouched
from fedtorch.training.step import Stepping
from fedtorch.tree import leaves, mapped, rows, size
from fedtorch.types import ConfigError

SIDE_BY_SIDE = 8
"""Clients from which on stacking them beats Opacus (small models); measured in benchmarks/privacy.py."""

WORDS = {
    "layers": "by formulas of the model's layers",
    "ghost": "from Opacus, but for those of linear layers and embeddings",
    "hooks": "from Opacus",
    "stacked": "by torch.func",
    "alone": "example after example, which is slow but suits any model",
}
"""Ways to the gradients of examples, the fastest first."""

LISTENING = ("layers", "hooks", "ghost")
"""Those that hear what layers take, and know by its place whose it is."""

TOLERANCE = 5e-3
"""How far a mode may be from the truth, in clipping norms; a wrong one is far beyond."""

MISSED = 1e-4
"""Share of the gradients of examples that a mode may leave out of their sum."""

HIDDEN = 1e-3
"""Share of the gradient below which a weight's may be shut out by a gate."""

FAINT = 1e-4
"""What a weight's part may be off in any case, in clipping norms: float32 rounds it to no less."""

UNCLIPPED = 1e12

OTHER = 1.25
"""How many times the weights of one client are another's, side by side with it."""

BEHIND = 3
"""Examples by which what weights that begin at zero hide is tried: each is one more for large models."""


def with_mode(
    model: nn.Module,
    clients: Sequence[Client],
    recipe: Recipe,
    chunk: int,
    alone: str | None = None,
) -> tuple[Recipe, int, list[str]]:
    """The recipe with the way to per-example gradients chosen, clients side by side, and what to say of it.

    For training without the fast path, which is tried for itself. Raises ConfigError where there is none.
    """
    plan = recipe.privacy.per_example
    if not plan:
        return recipe, chunk, []
    mode, why = str(plan.mode), alone and f"each collated alone: {alone}"
    if alone:
        if mode not in ("auto", "alone"):
            raise ConfigError(f"privacy.mode {mode} cannot train: {alone}; take mode alone")
        mode = "alone"
    elif mode == "auto":
        small = chunk >= SIDE_BY_SIDE and stacks(model, clients, recipe)
        mode, why = ("stacked", None) if small else _first_that_works(model, clients, recipe)
    elif why := _works(model, clients, recipe, mode):
        raise ConfigError(
            f"privacy.mode {mode} cannot train model {type(model).__name__}: {why}; try another mode"
            f"{models.fix_for(model)}"
        )
    chunk = chunk if mode == "stacked" else 1
    note = f"private gradients are taken {WORDS[mode]}" + (f" ({why})" if why else "")
    return replace(recipe, privacy=plan.by(mode)), chunk, [note]


def stacks(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> bool:
    """Whether private steps may be taken with clients side by side."""
    private = recipe.privacy.per_example
    return not private or _works(model, clients, recipe, "stacked") is None


def _first_that_works(
    model: nn.Module, clients: Sequence[Client], recipe: Recipe
) -> tuple[str, str | None]:
    """The mode, and why it is not the first."""
    whys: list[str] = []
    for mode in WORDS:
        why = _works(model, clients, recipe, mode)
        if why is None:
            return mode, whys[0] if whys else None
        whys.append(f"{mode}: {why}")
    raise ConfigError(
        f"model {type(model).__name__} gives no per-example gradients ({'; '.join(whys)})"
        f"{models.fix_for(model)}"
    )


def _works(model: nn.Module, clients: Sequence[Client], recipe: Recipe, mode: str) -> str | None:
    """Why one step in this mode fails, or None."""
    if why := _unfit(model, recipe, mode):
        return why
    batch = to(two_examples(largest(clients)), next(model.parameters()).device)
    if mode == "stacked" and (why := uneven(batch)):
        return why
    # a mode that takes whole batches is tried with what is drawn held still
    draws = mode in ("stacked", "alone") and draws_numbers(model, batch, recipe)
    if mode == "stacked" and draws:
        return "it draws random numbers other than by dropout"
    training(model)
    try:
        with untouched(
            model
        ):  # a step of torch.func that fails leaves its tensors in recurrent layers
            return _step_fails(model, clients, recipe, mode, batch, draws)
    except Exception as e:
        return _compiled(model, mode) or first(e)


def _step_fails(
    model: nn.Module, clients: Sequence[Client], recipe: Recipe, mode: str, batch: Any, draws: bool
) -> str | None:
    """The same where it is tried; what it raises counts too. ``draws``: numbers other than dropout's."""
    if mode == "ghost" and (name := _over_sequences(model, batch, recipe)):
        return (
            f"layer {name} sees several rows of an example, whose gradient has to be written out for its "
            "norm: that is mode hooks"
        )
    tried = batch, _varied(model, clients, recipe)
    if mode in LISTENING and (why := _unheard(model, tried, recipe, mode)):
        return why
    wrong = _misses(model, batch, recipe, mode)
    if mode == "alone" and draws:  # each example has numbers of its own
        return None
    wrong = wrong or any(_differs(model, b, recipe, mode) for b in tried)
    if mode != "alone" and not wrong:
        few = rows(tried[1], slice(0, BEHIND))
        look = partial(_differs, model, few, recipe, mode)
        wrong = bool(behind(model, _whole(model, few, recipe), HIDDEN, look))
    if wrong:
        return _compiled(model, mode) or (
            "its clipped gradients differ from those of the examples one by one (a weight used outside "
            "its layer, as by a penalty, or a layer or an option of one that is not known there)"
        )
    return None


def _unfit(model: nn.Module, recipe: Recipe, mode: str) -> str | None:
    """What speaks against it before anything is tried."""
    if mode == "ghost" and (name := models.tied(model)):
        return f"parameter {name} is shared by two layers, which ghost clipping cannot see"
    return one_by_one(recipe) if mode == "stacked" else None


def _unheard(model: nn.Module, tried: tuple[Any, Any], recipe: Recipe, mode: str) -> str | None:
    """What a way that listens to layers would not notice."""
    batch, varied = tried
    by_place = "and it tells examples by their places"
    if call := picks(model, varied, recipe):
        return f"rows are picked by what is in them ({call}), {by_place}"
    if where := crosses(model, varied, recipe, mode):
        return f"a row of {where} hangs on other examples, {by_place}"
    name = _outside(model, batch, recipe, mode)
    return f"parameter {name} is used outside its layer, as by a penalty" if name else None


def _outside(model: nn.Module, batch: Any, recipe: Recipe, mode: str) -> str | None:
    """Name of a weight on which the loss hangs past what its layer gives, whatever gates are shut."""
    apart = own_parameters(model) if mode == "layers" else {}  # heard wherever they are used
    everywhere = {p for some in apart.values() for p in some.values()}
    heard = {
        # one that is run by hand uses those of its last layer itself
        m: [p for p in m.parameters(recurse=type(m) in OWN) if p.requires_grad]
        for m in model.modules()
        if m not in apart
    }
    names, hooks = {id(p): k for k, p in model.named_parameters()}, []
    for m, own in heard.items():

        def seen(*_: Any, own: Sequence[Tensor] = own, outside: bool) -> None:
            for p in own:
                p.requires_grad_(outside)

        hooks.append(m.register_forward_pre_hook(partial(seen, outside=False)))
        hooks.append(m.register_forward_hook(partial(seen, outside=True), always_call=True))
    try:
        with seeds.seeded(0), undropped(model):
            values = recipe.losses(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    held = {id(p) for own in heard.values() for p in own if p not in everywhere}
    used = [id(t) for t in graph_leaves(values.sum()) if id(t) in held]
    return names[used[0]] if used else None


def _compiled(model: nn.Module, mode: str) -> str | None:
    """What of it is compiled, if anything is, where a mode listens to layers by hooks of Opacus."""
    compiled = [n for n, m in model.named_modules() if hasattr(m, "_orig_mod")]
    if not compiled or mode not in ("hooks", "ghost"):
        return None
    what = f"layer {compiled[0]}" if compiled[0] else "it"
    return (
        f"{what} is compiled, and Opacus hears nothing of what is inside: hand it over as it was before "
        "torch.compile"
    )


def _differs(model: nn.Module, batch: Any, recipe: Recipe, mode: str) -> bool:
    """Whether the sum of a batch's gradients is not that of its examples' one by one."""
    with undropped(model):
        alone = [_alone(model, batch, k, recipe) for k in range(size(batch))]
        norms = [float(a.norm()) for a in alone]
        clip = min((n for n in norms if 0 < n < math.inf), default=2.0) / 2
        with same_draws(size(batch)):
            apart = _one_step(model, batch, recipe, mode, clip, still=True)
        parts = apart.split([p.numel() for p in model.parameters() if p.requires_grad])
        found = [float(p.norm()) for p in parts]
        for a, norm in zip(alone, norms, strict=True):
            if math.isfinite(norm):  # in place: a large model's gradients are long
                apart.sub_(a, alpha=clip / max(norm, clip))
        # also of a weight that has little of the gradient
        most = [TOLERANCE * norm + FAINT * clip for norm in found]
        held = all(float(p.norm()) <= m for p, m in zip(parts, most, strict=True))
        return not (held and apart.norm() <= TOLERANCE * clip)


def _misses(model: nn.Module, batch: Any, recipe: Recipe, mode: str) -> bool:
    """Take a step as it trains, nothing held still; whether what hooks see is not the whole gradient.

    Of a compiled model they may see nothing, and of a penalty on weights never anything.
    """
    found = _one_step(model, batch, recipe, mode, UNCLIPPED)
    if mode not in LISTENING:
        return False
    whole = _whole(model, batch, recipe)
    alone = [_alone(model, batch, k, recipe).norm() for k in range(size(batch))]
    most = MISSED if whole.device.type == "cpu" else TOLERANCE
    return bool(whole.isfinite().all()) and not (found - whole).norm() <= most * sum(alone)


def _whole(model: nn.Module, batch: Any, recipe: Recipe) -> Tensor:
    """The gradient of a batch, flat."""
    model.zero_grad()
    with seeds.seeded(0):
        recipe.losses(model, batch).sum().backward()
    return _gradients(model)


def _varied(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> Any:
    """More examples, of other numbers where the model takes them: an expert is given a part of them."""
    data = largest(clients)
    many = torch.arange(SOME // 2) % len_of(data)
    batch = to(fetch(data, many), next(model.parameters()).device)
    other = inputs(partial(normal_inputs, 1.0, seeds.generator(0, "experts")), batch)
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
    with seeds.seeded(0), same_draws(1):
        recipe.losses(model, rows(batch, slice(k, k + 1))).sum().backward()
    return _gradients(model)


def _one_step(
    model: nn.Module, batch: Any, recipe: Recipe, mode: str, clip: float, still: bool = False
) -> Tensor:
    """The sum of clipped gradients in ``mode``, flat, without noise; ``still``: nothing is dropped."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        if not still:
            return recipe.losses(model, batch)
        # within what the way itself does with calls that drop, and anew where it looks at lengths first
        with undropped(model), same_draws(size(batch)):
            return recipe.losses(model, batch)

    steps = PrivateSteps(clip, 0.0, 1.0, [stream("aes", 0, "probe") for _ in range(2)], mode)
    model.zero_grad()
    with seeds.seeded(0):
        if mode != "stacked":
            from fedtorch.privacy.one_client import private_gradients  # few visits are private

            with private_gradients(model, losses, steps) as gradients:
                gradients.backward(batch)
            return _gradients(model)
        # beside a client of other weights and examples: a layer of torch may take one's for the other's
        state = snapshot(model)
        names = [k for k, p in model.named_parameters() if p.requires_grad]
        params = {k: torch.stack([state[k], OTHER * state[k]]) for k in names}
        rest = {k: v.expand(2, *v.shape) for k, v in state.items() if k not in params}
        batch = mapped(lambda t: torch.stack([t, t.flip(0)]), batch)
        first = leaves(batch)[0]
        mask = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        stepping = Stepping(model, recipe.asked)
        grads, _ = stacked_gradients(stepping, params, rest, batch, mask, steps)
        return torch.cat([grads[k][0].flatten() for k in names]).double()


def _gradients(model: nn.Module) -> Tensor:
    # a weight an example does not reach (an expert not chosen) has no gradient rather than zeros
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad.detach()).flatten().double()
            for p in model.parameters()
            if p.requires_grad
        ]
    )
