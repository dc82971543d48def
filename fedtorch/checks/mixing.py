"""Whether what one example adds depends on others: clipping by example protects nobody then.

A loss that looks at neighbours of the same class, at large outputs only, in large batches only, or at what
it has kept of batches before would pass a trial of two examples. So model and loss are tried on batches of
many kinds, in float64 where they can be, and each example's numbers are held to those it has alone.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.checks.company import LARGEST, SCALES, WATCHED, Near, meets, tolerant
from fedtorch.checks.held import Held
from fedtorch.recipe import Recipe
from fedtorch.training.module import forward, snapshot, training, undropped
from fedtorch.training.outline import copied, untouched
from fedtorch.tree import leaves, mapped, rebuilt, rows, same, size
from fedtorch.types import ConfigError

HEAVY = 1 << 20
"""Products of one forward from which on float64, several times slower, is for few examples alone."""

AFFORD = 6 << 30
"""Products that the largest batch for a model may take: a second, about."""

ROOM = 1 << 21
"""Numbers that the examples of the largest batch for a model may have."""

DRAWS = 4
"""Times that a model which draws is tried wholly, each time with other numbers."""

RARE = 28
"""Times that its few examples are tried: what it does with a small chance may be what mixes them."""

STATEFUL = 4
"""Batches after which a loss must not remember what they were."""


class Tried(NamedTuple):
    """A model and a batch in one type of numbers."""

    model: nn.Module
    batch: Any
    near: Near
    held: Held
    """What it draws, other than by dropout."""


def mixes(model: nn.Module, batch: Any, recipe: Recipe) -> str | None:
    """What of model and loss depends on other examples, or None; ``batch`` is of a few.

    The labels must be of two classes at least, each there more than once. Model and loss are left as they
    were, but for a loss that is a function and keeps something. Raises ConfigError where a trial fails.
    """
    recipe = _another(recipe)  # it may count or keep
    with seeds.seeded(0), untouched(model), undropped(model):
        try:
            own = Tried(model, batch, Near(1e-3, 1e-5), Held(0, size(batch)))
            fine = wide(own, recipe)
            with untouched(fine.model), undropped(fine.model):
                work, before = products(model, batch, recipe), snapshot(fine.model)
                rough = own if work > HEAVY else fine
                why = _found(fine, rough, recipe, work)
                # whether examples mix may hang on what is drawn
                for seed in range(1, DRAWS if own.held.calls else 1):
                    held = Held(seed, size(batch))
                    why = why or _found(
                        fine._replace(held=held), rough._replace(held=held), recipe, work
                    )
                many = size(batch)
                rare = min(RARE, AFFORD // (8 * many * work)) if own.held.calls else 0
                for seed in range(DRAWS, rare):
                    rarely = fine._replace(held=Held(seed, many))
                    why = why or _neighbours(rarely, recipe, (1.0,), many)
                # numbers of some size may be needed for that
                after = snapshot(fine.model)
                moved = [k for k, v in before.items() if not bool(same(v, after[k]).all())]
                return why or (f"{moved[0]} is changed past clipping and noise" if moved else None)
        except ConfigError:
            raise
        except Exception as e:
            if why := _fails_alone(model, batch, recipe):
                raise ConfigError(why) from e
            raise ConfigError(
                f"sample-level privacy tries model {type(model).__name__} and its loss on examples "
                "alone and in company, without recording gradients, where they fail "
                f"({type(e).__name__}: {e}): each must have a loss by itself, and "
                "one that takes gradients in its own forward cannot train so; client-level privacy can"
            ) from e


def _fails_alone(model: nn.Module, batch: Any, recipe: Recipe) -> str | None:
    """What goes wrong with one example, gradients recorded; None: nothing does."""
    try:
        with torch.enable_grad():
            recipe.losses(model, rows(batch, slice(0, 1)))
    except Exception as e:
        return (
            f"sample-level privacy looks at each example alone, where model {type(model).__name__} or its "
            f"loss fails ({type(e).__name__}: {e}): let them take a batch of one (squeeze() drops its axis "
            "too, squeeze(-1) does not)"
        )
    return None


def _found(fine: Tried, rough: Tried, recipe: Recipe, work: int) -> str | None:
    """``fine`` shows little mixing; ``rough`` takes the many examples, where a model is large."""
    # first: what a loss keeps of numbers of any size, as the others show it, hides what it keeps of these
    if remembers := _remembers(rough, recipe):
        return remembers
    if recipe.step is None:  # the loss by itself
        x, y = fine.batch
        with torch.no_grad():
            output = forward(fine.model, x)
        if meets(recipe.loss, output, y, fine.near, LARGEST):
            return "an example's loss depends on its neighbours"
    return (
        _neighbours(fine, recipe, (1.0,), size(fine.batch))
        or _neighbours(rough, recipe, SCALES[1:], _most(recipe))
        or _neighbours(rough, recipe, (1.0,), _affordable(rough.batch, recipe, work))
        or _unlike(rough, recipe)
        or _gradients(fine, recipe, SCALES[:2], WATCHED)
        or _gradients(rough, recipe, (1.0,), _most(recipe))
    )


def wide(own: Tried, recipe: Recipe) -> Tried:
    """The same in float64, where a little mixing is no rounding; as it is where that is not taken."""
    try:
        wide = copied(own.model).double()
        batch = mapped(lambda t: t.double() if t.is_floating_point() else t, own.batch)
        with torch.no_grad(), untouched(wide):
            if _copied(recipe).tried(training(wide), batch).dtype != torch.float64:
                return own
    except Exception:
        return own
    return Tried(wide, batch, Near(1e-6, 1e-9), own.held)


def products(model: nn.Module, batch: Any, recipe: Recipe) -> int:
    """About how many numbers a forward of one example multiplies, by the weights and outputs of layers."""
    found: list[int] = []

    def count(module: nn.Module, _: Any, output: Any) -> None:
        made = sum(t.numel() for t in leaves(output))
        weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        found.extend(p.numel() * made // p.shape[0] for p in weights)

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    try:
        with torch.no_grad():
            one = rows(batch, _index([0]))
            # a loss, which may keep what it is given, is not asked
            forward(model, one[0]) if recipe.step is None else recipe.tried(model, one)
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, sum(found))


def _neighbours(t: Tried, recipe: Recipe, scales: Sequence[float], most: int) -> str | None:
    """Losses of examples alone and in batches, at several sizes of the inputs."""
    for scale in scales:
        given = _scaled(t.batch, scale)
        with torch.no_grad(), tolerant(scale):
            alone = _alone(t, recipe, given)
            for index in _batches(size(given), most):
                if _differ(alone, _losses(t, recipe, given, index), index, t.near):
                    return "one example's result depends on its neighbours"
    return None


def _unlike(t: Tried, recipe: Recipe) -> str | None:
    """Losses of examples as they are among others of another size or sign, as one extreme row is."""
    n = size(t.batch)
    index = _index([*range(n)])
    with torch.no_grad():
        alone = _alone(t, recipe, t.batch)
        for scale in (10.0, *SCALES[1:]):
            for factor in (scale, -scale):
                with tolerant(scale):
                    found = _losses(t, recipe, _among(t.batch, n, factor), index)
                    if _differ(alone, found, index[: len(alone)], t.near):
                        return "one example's result depends on its neighbours"
    return None


def _gradients(t: Tried, recipe: Recipe, scales: Sequence[float], most: int) -> str | None:
    """The gradient of a batch must be the sum of those of its examples."""
    watched = [*_watched(t.batch)]
    times = -(-most // len(watched))
    for scale in scales:
        given = _scaled(t.batch, scale)
        with tolerant(scale):
            alone = [_gradient(t, recipe, given, _index([k])) for k in watched]
            whole = float(torch.stack([a.norm() for a in alone]).sum())
            found = _gradient(t, recipe, given, _index(watched * times))
            least = times * (t.near.rtol * whole + t.near.atol)
            if math.isfinite(whole) and not float((found - times * sum(alone)).norm()) <= least:
                return "an example's gradient depends on its neighbours"
    return None


def _remembers(t: Tried, recipe: Recipe) -> str | None:
    """Losses of one batch, after others of two kinds: a count of calls may change them, other data not."""
    n = size(t.batch)
    many = _index([k % n for k in range(4 * n)])
    ends = []
    with torch.no_grad():
        for scale in (1.0, 0.5):
            own, order = _another(recipe), many if scale == 1 else many.flip(0)
            for _ in range(STATEFUL):
                _again(t, own, _scaled(t.batch, scale), many, order)
            ends.append(_losses(t, own, t.batch, torch.arange(n)))
    if torch.allclose(ends[0], ends[1], rtol=t.near.rtol, atol=t.near.atol, equal_nan=True):
        return None
    return "a loss depends on batches before"


def _again(t: Tried, recipe: Recipe, batch: Any, places: Tensor, order: Tensor) -> None:
    """Ask for the losses of more rows, made of a model's outputs where it is the loss that is asked."""
    if recipe.step is not None:
        recipe.tried(t.model, rows(batch, order))
        return
    x, y = batch
    n = size(y)
    output = mapped(lambda v: v[places] if v.dim() and len(v) == n else v, forward(t.model, x))
    recipe.loss(output, rows(y, order))


def _max_batch(recipe: Recipe) -> int:
    """Of more examples no forward is ever taken."""
    plan = recipe.privacy.per_example
    return plan.max_batch if plan else 1


def _most(recipe: Recipe) -> int:
    """Twice as many examples as a step is expected to take."""
    plan = recipe.privacy.per_example
    expected = math.ceil(plan.batch_size) if plan else 0
    return min(2 * expected + 1, _max_batch(recipe))


def _affordable(batch: Any, recipe: Recipe, work: int) -> int:
    """Examples of the largest batch: as many as a step may take, if there is memory and time for them."""
    room = ROOM // max(1, sum(t[:1].numel() for t in leaves(batch)))
    return max(_most(recipe), min(_max_batch(recipe), room, AFFORD // work))


def _batches(count: int, most: int) -> Iterator[Tensor]:
    """Pairs, few and many, of both classes, some twice."""
    places: Sequence[int]
    for places in (
        [0, 1],
        [1, 0],
        [0, 2, 3],
        [3, 0, 0, 1],
        [2, 2, 1, 1, 0],
        range(max(count, most)),
    ):
        yield _index([k % count for k in places])


def _watched(batch: Any) -> range:
    return range(min(WATCHED, size(batch)))


def _copied(recipe: Recipe) -> Recipe:
    """With a copy of the loss, or of the step."""
    if recipe.step is None:
        return replace(recipe, loss=copy.deepcopy(recipe.loss))
    return replace(recipe, step=copy.deepcopy(recipe.step))


def _another(recipe: Recipe) -> Recipe:
    """The same where it can be copied."""
    try:
        return _copied(recipe)
    except Exception:
        return recipe


def _index(places: list[int]) -> Tensor:
    return torch.tensor(places)


def _alone(t: Tried, recipe: Recipe, batch: Any) -> list[Tensor]:
    return [_losses(t, recipe, batch, _index([k])) for k in _watched(batch)]


def _losses(t: Tried, recipe: Recipe, batch: Any, index: Tensor) -> Tensor:
    with t.held.of(index):
        return recipe.tried(t.model, rows(batch, index))


def _gradient(t: Tried, recipe: Recipe, batch: Any, index: Tensor) -> Tensor:
    t.model.zero_grad()
    with t.held.of(index):
        recipe.losses(t.model, rows(batch, index)).sum().backward()
    # a weight that the examples do not reach, as an expert not chosen, has no gradient
    every = [(p, p.grad) for p in t.model.parameters() if p.requires_grad]
    found = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in every]
    return torch.cat([g.detach().flatten().double() for g in found])


def _differ(alone: list[Tensor], found: Tensor, index: Tensor, near: Near) -> bool:
    """Whether a watched example's loss is another in company; what is not finite is held to nothing."""
    for place, k in enumerate(index.tolist()[: 2 * WATCHED]):
        if not found.dim():  # alone it had a number of its own
            return True
        own = float(alone[k].flatten()[0]) if k < len(alone) else math.inf
        far = abs(float(found[place]) - own)
        if math.isfinite(own) and not far <= near.rtol * abs(own) + near.atol:
            return True
    return False


def _scaled(batch: Any, scale: float) -> Any:
    if scale == 1:
        return batch
    return inputs(lambda t: t * scale if t.is_floating_point() else t, batch)


def _among(batch: Any, n: int, factor: float) -> Any:
    """The examples behind the watched ones so many times as large."""
    scale = torch.where(torch.arange(n) < WATCHED, 1.0, factor)

    def scaled(t: Tensor) -> Tensor:
        own = t.is_floating_point() and t.dim() and len(t) == n
        return t * scale.to(t).view(-1, *[1] * (t.dim() - 1)) if own else t

    return inputs(scaled, batch)


def inputs(fn: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """``fn`` of the inputs: of a pair the first part, of anything else all."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return rebuilt(batch, [mapped(fn, batch[0]), batch[1]])
    return mapped(fn, batch)
