"""Whether what one example adds depends on others: clipping by example protects nobody then.

A loss that looks at neighbours of the same class, at large outputs only, in large batches only, or at what
it has kept of batches before would pass a trial of two examples. So model and loss are tried on batches of
many kinds, in float64 where they can be, and each example's numbers are held to those it has alone.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.checks.company import LARGEST, SCALES, WATCHED, Near, mapped, meets, tolerant
from fedtorch.recipe import Recipe
from fedtorch.training.losses import Loss, reduce
from fedtorch.training.module import forward, training, undropped
from fedtorch.training.outline import copied, untouched
from fedtorch.tree import leaves, rows, size
from fedtorch.types import ConfigError

HEAVY = 1 << 20
"""Products of one forward from which on float64, several times slower, is for few examples alone."""

AFFORD = 6 << 30
"""Products that the largest batch for a model may take: a second, about."""

ROOM = 1 << 21
"""Numbers that the examples of the largest batch for a model may have."""

STATEFUL = 4
"""Batches after which a loss must not remember what they were."""


class Tried(NamedTuple):
    """A model and a batch in one type of numbers."""

    model: nn.Module
    x: Any
    y: Any
    near: Near


def mixes(model: nn.Module, x: Any, y: Any, recipe: Recipe) -> str | None:
    """What of model and loss depends on other examples, or None; ``x`` and ``y`` are a batch of a few.

    The labels must be of two classes at least, each there more than once. Model and loss are left as they
    were, but for a loss that is a function and keeps something. Raises ConfigError where a trial fails.
    """
    recipe = replace(recipe, loss=_another(recipe.loss))  # it may count or keep
    with seeds.seeded(0), untouched(model), undropped(model):
        try:
            own = Tried(model, x, y, Near(1e-3, 1e-5))
            fine = _wide(own, recipe.loss)
            with untouched(fine.model), undropped(fine.model):
                work = products(model, x)
                return _found(fine, own if work > HEAVY else fine, recipe, work)
        except ConfigError:
            raise
        except Exception as e:
            raise ConfigError(
                f"sample-level privacy tries model {type(model).__name__} and its loss on examples "
                "alone and in company, without recording gradients, where they fail "
                f"({type(e).__name__}: {e}): "
                "one that takes gradients in its own forward cannot train so; client-level privacy can"
            ) from e


def _found(fine: Tried, rough: Tried, recipe: Recipe, work: int) -> str | None:
    """``fine`` shows little mixing; ``rough`` takes the many examples, where a model is large."""
    # first: what a loss keeps of numbers of any size, as the others show it, hides what it keeps of these
    if remembers := _remembers(rough, recipe.loss):
        return remembers
    with torch.no_grad():
        output = forward(fine.model, fine.x)
    if meets(recipe.loss, output, fine.y, fine.near, LARGEST):
        return "an example's loss depends on its neighbours"
    return (
        _neighbours(fine, recipe, (1.0,), size(fine.y))
        or _neighbours(rough, recipe, SCALES[1:], _most(recipe))
        or _neighbours(rough, recipe, (1.0,), _affordable(rough.x, recipe, work))
        or _unlike(rough, recipe)
        or _gradients(fine, recipe, SCALES[:2], WATCHED)
        or _gradients(rough, recipe, (1.0,), _most(recipe))
    )


def _wide(own: Tried, loss: Loss) -> Tried:
    """The same in float64, where a little mixing is no rounding; as it is where that is not taken."""
    try:
        wide = copied(own.model).double()
        x, y = _doubled(own.x), _doubled(own.y)
        with torch.no_grad(), untouched(wide):
            if reduce(copy.deepcopy(loss)(forward(training(wide), x), y)).dtype != torch.float64:
                return own
    except Exception:
        return own
    return Tried(wide, x, y, Near(1e-6, 1e-9))


def products(model: nn.Module, x: Any) -> int:
    """About how many numbers a forward of one example multiplies, by the weights and outputs of layers."""
    found: list[int] = []

    def count(module: nn.Module, _: Any, output: Any) -> None:
        made = sum(t.numel() for t in leaves(output))
        weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        found.extend(p.numel() * made // p.shape[0] for p in weights)

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    try:
        with torch.no_grad():
            forward(model, rows(x, _index([0])))
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, sum(found))


def _neighbours(t: Tried, recipe: Recipe, scales: Sequence[float], most: int) -> str | None:
    """Losses of examples alone and in batches, at several sizes of the inputs."""
    for scale in scales:
        given = _scaled(t.x, scale)
        with torch.no_grad(), tolerant(scale):
            alone = _alone(t, recipe.loss, given)
            for index in _batches(size(t.y), most):
                if _differ(alone, _losses(t, recipe.loss, given, index), index, t.near):
                    return "one example's result depends on its neighbours"
    return None


def _unlike(t: Tried, recipe: Recipe) -> str | None:
    """Losses of examples as they are among others of another size or sign, as one extreme row is."""
    n = size(t.y)
    index = _index([*range(n)])
    with torch.no_grad():
        alone = _alone(t, recipe.loss, t.x)
        for scale in (10.0, *SCALES[1:]):
            for factor in (scale, -scale):
                with tolerant(scale):
                    found = _losses(t, recipe.loss, _among(t.x, n, factor), index)
                    if _differ(alone, found, index[: len(alone)], t.near):
                        return "one example's result depends on its neighbours"
    return None


def _gradients(t: Tried, recipe: Recipe, scales: Sequence[float], most: int) -> str | None:
    """The gradient of a batch must be the sum of those of its examples."""
    watched = [*_watched(t.y)]
    times = -(-most // len(watched))
    for scale in scales:
        given = _scaled(t.x, scale)
        with tolerant(scale):
            alone = [_gradient(t, recipe.loss, given, _index([k])) for k in watched]
            whole = float(torch.stack([a.norm() for a in alone]).sum())
            found = _gradient(t, recipe.loss, given, _index(watched * times))
            least = times * (t.near.rtol * whole + t.near.atol)
            if math.isfinite(whole) and not float((found - times * sum(alone)).norm()) <= least:
                return "an example's gradient depends on its neighbours"
    return None


def _remembers(t: Tried, loss: Loss) -> str | None:
    """Losses of one batch, after others of two kinds: a count of calls may change them, other data not."""
    many = _index([k % size(t.y) for k in range(4 * size(t.y))])
    ends = []
    with torch.no_grad():
        for scale in (1.0, 0.5):
            own = _another(loss)
            labels = rows(t.y, many if scale == 1 else many.flip(0))
            for _ in range(STATEFUL):
                own(_each(forward(t.model, _scaled(t.x, scale)), size(t.y), many), labels)
            ends.append(reduce(own(forward(t.model, t.x), t.y)))
    if torch.allclose(ends[0], ends[1], rtol=t.near.rtol, atol=t.near.atol, equal_nan=True):
        return None
    return "a loss depends on batches before"


def _max_batch(recipe: Recipe) -> int:
    """Of more examples no forward is ever taken."""
    plan = recipe.privacy.per_example
    return plan.max_batch if plan else 1


def _most(recipe: Recipe) -> int:
    """Twice as many examples as a step is expected to take."""
    plan = recipe.privacy.per_example
    expected = math.ceil(plan.batch_size) if plan else 0
    return min(2 * expected + 1, _max_batch(recipe))


def _affordable(x: Any, recipe: Recipe, work: int) -> int:
    """Examples of the largest batch: as many as a step may take, if there is memory and time for them."""
    room = ROOM // max(1, sum(t[:1].numel() for t in leaves(x)))
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


def _watched(y: Any) -> range:
    return range(min(WATCHED, size(y)))


def _another(loss: Loss) -> Loss:
    try:
        return copy.deepcopy(loss)
    except Exception:
        return loss


def _index(places: list[int]) -> Tensor:
    return torch.tensor(places)


def _alone(t: Tried, loss: Loss, x: Any) -> list[Tensor]:
    return [_losses(t, loss, x, _index([k])) for k in _watched(t.y)]


def _losses(t: Tried, loss: Loss, x: Any, index: Tensor) -> Tensor:
    return reduce(loss(forward(t.model, rows(x, index)), rows(t.y, index)))


def _each(output: Any, n: int, index: Tensor) -> Any:
    """Some of the ``n`` rows of an output, whatever it is in."""
    return mapped(output, lambda t: t[index] if t.dim() and len(t) == n else t)


def _gradient(t: Tried, loss: Loss, x: Any, index: Tensor) -> Tensor:
    t.model.zero_grad()
    _losses(t, loss, x, index).sum().backward()
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


def _scaled(x: Any, scale: float) -> Any:
    return x if scale == 1 else mapped(x, lambda t: t * scale if t.is_floating_point() else t)


def _among(x: Any, n: int, factor: float) -> Any:
    """The examples behind the watched ones so many times as large."""
    scale = torch.where(torch.arange(n) < WATCHED, 1.0, factor)

    def scaled(t: Tensor) -> Tensor:
        own = t.is_floating_point() and t.dim() and len(t) == n
        return t * scale.to(t).view(-1, *[1] * (t.dim() - 1)) if own else t

    return mapped(x, scaled)


def _doubled(value: Any) -> Any:
    return mapped(value, lambda t: t.double() if t.is_floating_point() else t)
