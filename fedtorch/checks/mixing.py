"""Whether what one example adds depends on others: clipping by example protects nobody then.

A loss that looks at neighbours of the same class, at large outputs only, in large batches only, or at what
it has kept of batches before would pass a trial of two examples. So model and loss are tried on batches of
many kinds, in float64 where they can be, and each example's numbers are held to those it has alone.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.checks.company import LARGEST_BATCH, SCALES, WATCHED, Near, meets, tolerant
from fedtorch.checks.crowds import AFFORD, affordable, alike, among, enlarged, most, places
from fedtorch.checks.gates import behind
from fedtorch.checks.held import RowDraws
from fedtorch.checks.precise import Tried, another, precise, products
from fedtorch.recipe import Recipe
from fedtorch.training.module import forward, snapshot, undropped
from fedtorch.training.outline import untouched
from fedtorch.tree import mapped, rows, same, size
from fedtorch.types import ConfigError

HEAVY = 1 << 20
"""Products of one forward from which on float64, several times slower, is for few examples alone."""

TIMES = 4
"""Times that a model which draws is tried wholly, each time with other numbers."""

RARE = 28
"""Times that its few examples are tried: what it does with a small chance may be what mixes them."""

HIDDEN = 10
"""Share of the gradient, in units of what is seen of it, below which a weight's may be shut out."""

STATEFUL = 4
"""Batches after which a loss must not remember what they were."""


def mixes(model: nn.Module, batch: Any, recipe: Recipe) -> str | None:
    """What of model and loss depends on other examples, or None; ``batch`` is of a few.

    The labels must be of two classes at least, each there more than once. Model and loss are left as they
    were, but for a loss that is a function and keeps something. Raises ConfigError where a trial fails.
    """
    recipe = another(recipe)
    try:
        with precise(model, batch, recipe) as (own, fine):
            work, before = products(model, batch, recipe), snapshot(fine.model)
            rough = own if work > HEAVY else fine
            why = _found(fine, rough, work)
            if not why:
                gradient = fine.gradient(torch.arange(size(batch)))
                why = behind(fine.model, gradient, HIDDEN * fine.near.rtol, partial(_behind, fine))
            # whether examples mix may hang on what is drawn
            many, drawn = size(batch), own.held.calls
            for seed in range(1, TIMES if drawn else 1):
                held = RowDraws(seed, many)
                why = why or _found(fine._replace(held=held), rough._replace(held=held), work)
            for seed in range(TIMES, min(RARE, AFFORD // (8 * many * work)) if drawn else 0):
                rarely = fine._replace(held=RowDraws(seed, many))
                why = why or _neighbours(rarely, (1.0,), many)
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
        with seeds.seeded(0), untouched(model), undropped(model), torch.enable_grad():
            recipe.losses(model, rows(batch, slice(0, 1)))
    except Exception as e:
        return (
            f"sample-level privacy looks at each example alone, where model {type(model).__name__} or its "
            f"loss fails ({type(e).__name__}: {e}): let them take a batch of one (squeeze() drops its axis "
            "too, squeeze(-1) does not)"
        )
    return None


def _found(fine: Tried, rough: Tried, work: int) -> str | None:
    """``fine`` shows little mixing; ``rough`` takes the many examples, where a model is large."""
    recipe = fine.recipe
    # first: what a loss keeps of numbers of any size, as the others show it, hides what it keeps of these
    if remembers := _remembers(rough):
        return remembers
    if recipe.step is None:  # the loss by itself
        x, y = fine.batch
        with torch.no_grad():
            output = forward(fine.model, x)
        if meets(recipe.loss, output, y, fine.near, LARGEST_BATCH):
            return "an example's loss depends on its neighbours"
    return (
        _neighbours(fine, (1.0,), size(fine.batch))
        or _neighbours(rough, SCALES[1:], most(recipe))
        or _neighbours(rough, (1.0,), affordable(rough.batch, recipe, work))
        or _unlike(rough)
        or _gradients(fine, SCALES[:2], WATCHED)
        or _gradients(rough, (1.0,), most(recipe))
    )


def _behind(t: Tried) -> str | None:
    """The same with gates open, in short."""
    return _neighbours(t, (1.0,), size(t.batch)) or _gradients(t, (1.0,), WATCHED)


def _neighbours(t: Tried, scales: Sequence[float], most: int) -> str | None:
    """Losses of examples alone and in batches, at several sizes of the inputs."""
    for scale in scales:
        given = t._replace(batch=enlarged(t.batch, scale))
        with torch.no_grad(), tolerant(scale):
            alone = _alone(given)
            for index in places(size(t.batch), most):
                if _differ(alone, given.losses(index), index, t.near):
                    return "one example's result depends on its neighbours"
    return None


def _unlike(t: Tried) -> str | None:
    """Losses of examples among others of another size or sign, or of zeros, as what fills up is."""
    n = size(t.batch)
    index = torch.arange(n)
    with torch.no_grad():
        alone = _alone(t)
        for scale in (10.0, *SCALES[1:]):
            for factor in (scale, -scale) if scale > 10 else (0.0, scale, -scale):
                with tolerant(scale):
                    found = t._replace(batch=among(t.batch, n, factor)).losses(index)
                    if _differ(alone, found, index[: len(alone)], t.near):
                        return "one example's result depends on its neighbours"
        with tolerant(0.0):
            own = t._replace(batch=alike(t.batch))
            alone = _alone(own)
            found = own._replace(batch=among(own.batch, n, 0.0)).losses(index)
            if _differ(alone, found, index[: len(alone)], t.near):
                return "one example's result depends on its neighbours"
    return None


def _gradients(t: Tried, scales: Sequence[float], most: int) -> str | None:
    """The gradient of a batch must be the sum of those of its examples."""
    watched = [*_watched(t.batch)]
    times = -(-most // len(watched))
    for scale in scales:
        given = t._replace(batch=enlarged(t.batch, scale))
        with tolerant(scale):
            alone, whole = torch.zeros(()), 0.0
            for k in watched:
                one = given.gradient(torch.tensor([k]))
                whole += float(one.norm())
                alone = one.add_(alone)  # in place: a large model's gradients are long
            apart = given.gradient(torch.tensor(watched * times)).sub_(alone, alpha=times)
            least = times * (t.near.rtol * whole + t.near.atol)
            if math.isfinite(whole) and not float(apart.norm()) <= least:
                return "an example's gradient depends on its neighbours"
    return None


def _remembers(t: Tried) -> str | None:
    """Losses of one batch, after others of two kinds: a count of calls may change them, other data not."""
    n = size(t.batch)
    many = torch.arange(4 * n) % n
    ends = []
    with torch.no_grad():
        for scale in (1.0, 0.5):
            own, order = t._replace(recipe=another(t.recipe)), many if scale == 1 else many.flip(0)
            for _ in range(STATEFUL):
                _again(own, enlarged(t.batch, scale), many, order)
            ends.append(own.losses(torch.arange(n)))
    if torch.allclose(ends[0], ends[1], rtol=t.near.rtol, atol=t.near.atol, equal_nan=True):
        return None
    return "a loss depends on batches before"


def _again(t: Tried, batch: Any, places: Tensor, order: Tensor) -> None:
    """Ask for the losses of more rows, made of a model's outputs where it is the loss that is asked."""
    if t.recipe.step is not None:
        t.recipe.tried(t.model, rows(batch, order))
        return
    x, y = batch
    n = size(y)
    output = mapped(lambda v: v[places] if v.dim() and len(v) == n else v, forward(t.model, x))
    t.recipe.loss(output, rows(y, order))


def _watched(batch: Any) -> range:
    return range(min(WATCHED, size(batch)))


def _alone(t: Tried) -> list[Tensor]:
    return [t.losses(torch.tensor([k])) for k in _watched(t.batch)]


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
