"""Whether what one example adds depends on others: clipping by example protects nobody then.

A loss that looks at neighbours of the same class, at large outputs only, in large batches only, or at what
it has kept of batches before would pass a trial of two examples. So model and loss are tried on batches of
many kinds, in float64 where they can be, and each example's numbers are held to those it has alone.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.client import Recipe
from fedtorch.losses import Loss, reduce
from fedtorch.modules import forward, training, undropped
from fedtorch.outline import copied, untouched
from fedtorch.privacy import SampleLevel
from fedtorch.tree import leaves, rebuilt, rows, size
from fedtorch.types import ConfigError

WATCHED = 4
"""Examples that are looked at, alone and in company."""

SCALES = (1.0, 30.0, 1e3, 1e6)
"""Inputs, and outputs, are tried so many times as large."""

MANY = 512
"""Examples of the largest batch that a loss is tried with."""

ROOM = 1 << 21
"""Numbers that the examples of the largest batch for a model may have."""

STATEFUL = 4
"""Batches after which a loss must not remember what they were."""


def mixes(model: nn.Module, x: Any, y: Any, recipe: Recipe) -> str | None:
    """What of model and loss depends on other examples, or None; ``x`` and ``y`` are a batch of a few.

    The labels must be of two classes at least, each there more than once. Model and loss are left as they
    were, but for a loss that is a function and keeps something. Raises ConfigError where a trial fails.
    """
    recipe = replace(recipe, loss=_another(recipe.loss))  # it may count or keep
    with seeds.seeded(0):
        wide = _wide(model, x, y, recipe.loss)
        tried, x, y, near = wide or (model, x, y, {"rtol": 1e-3, "atol": 1e-5})
        with untouched(tried), undropped(tried):
            try:
                return _found(tried, x, y, recipe, near)
            except ConfigError:
                raise
            except Exception as e:
                raise ConfigError(
                    f"sample-level privacy tries model {type(model).__name__} and its loss on examples "
                    "alone and in company, without recording gradients, where they fail "
                    f"({type(e).__name__}: {e}): "
                    "one that takes gradients in its own forward cannot train so; client-level privacy can"
                ) from e
            finally:
                tried.zero_grad()


def _found(model: nn.Module, x: Any, y: Any, recipe: Recipe, near: Any) -> str | None:
    return (
        _neighbours(model, x, y, recipe, near)
        or _unlike(model, x, y, recipe, near)
        or _company(model, x, y, recipe, near)
        or _gradients(model, x, y, recipe, near)
        or _remembers(model, x, y, recipe.loss, near)
    )


def _wide(model: nn.Module, x: Any, y: Any, loss: Loss) -> Any:
    """Model and batch in float64, where a little mixing is no rounding; None where they do not take it."""
    try:
        wide = copied(model).double()
        x, y = _doubled(x), _doubled(y)
        with torch.no_grad(), untouched(wide):
            if reduce(copy.deepcopy(loss)(forward(training(wide), x), y)).dtype != torch.float64:
                return None
    except Exception:
        return None
    return wide, x, y, {"rtol": 1e-6, "atol": 1e-9}


def _neighbours(model: nn.Module, x: Any, y: Any, recipe: Recipe, near: Any) -> str | None:
    """Losses of examples alone and in batches, at several sizes of the inputs."""
    for scale in SCALES:
        given = _scaled(x, scale)
        with torch.no_grad(), _at(scale):
            alone = [_losses(model, recipe.loss, given, y, _index([k])) for k in _watched(y)]
            for index in _batches(size(y), recipe, _room(x) if scale == 1 else 1):
                if _differ(alone, _losses(model, recipe.loss, given, y, index), index, near):
                    return "one example's result depends on its neighbours"
    return None


def _unlike(model: nn.Module, x: Any, y: Any, recipe: Recipe, near: Any) -> str | None:
    """Losses of examples as they are among others of another size or sign, as one extreme row is."""
    index = _index([*range(size(y))])
    with torch.no_grad():
        alone = [_losses(model, recipe.loss, x, y, _index([k])) for k in _watched(y)]
        for scale in (10.0, *SCALES[1:]):
            for factor in (scale, -scale):
                with _at(scale):
                    found = _losses(model, recipe.loss, _among(x, size(y), factor), y, index)
                    if _differ(alone, found, index[: len(alone)], near):
                        return "one example's result depends on its neighbours"
    return None


def _company(model: nn.Module, x: Any, y: Any, recipe: Recipe, near: Any) -> str | None:
    """The loss alone, on outputs of any size and in large batches."""
    with torch.no_grad():
        output = forward(model, x)
    draw = seeds.generator(0, "outputs")
    noise = [
        torch.randn(t.shape, generator=draw).to(t) for t in leaves(output) if t.is_floating_point()
    ]
    for scale in SCALES:
        given = _filled(output, [scale * t for t in noise])
        with torch.no_grad(), _at(0.0):  # outputs may not be any numbers: probabilities, for one
            alone = [_loss(recipe.loss, given, y, _index([k])) for k in _watched(y)]
            for many in (size(y), MANY):
                index = _index([k % size(y) for k in range(many)])
                if _differ(alone, _loss(recipe.loss, given, y, index), index, near):
                    return "an example's loss depends on its neighbours"
    return None


def _gradients(model: nn.Module, x: Any, y: Any, recipe: Recipe, near: Any) -> str | None:
    """The gradient of a batch must be the sum of those of its examples; of a large one, too."""
    for scale in SCALES[:2]:
        given = _scaled(x, scale)
        with _at(scale):
            alone = [_gradient(model, recipe.loss, given, y, _index([k])) for k in _watched(y)]
            whole = float(torch.stack([a.norm() for a in alone]).sum())
            for times in (1, math.ceil(_most(recipe) / len(alone))):
                found = _gradient(model, recipe.loss, given, y, _index([*_watched(y)] * times))
                least = times * (near["rtol"] * whole + near["atol"])
                far = float((found - times * sum(alone)).norm())
                if math.isfinite(whole) and not far <= least:
                    return "an example's gradient depends on its neighbours"
    return None


def _remembers(model: nn.Module, x: Any, y: Any, loss: Loss, near: Any) -> str | None:
    """Losses of one batch, after others of two kinds: a count of calls may change them, other data not."""
    many = _index([k % size(y) for k in range(4 * size(y))])
    ends = []
    with torch.no_grad():
        for scale in (1.0, 0.5):
            own = _another(loss)
            others = rows(_scaled(x, scale), many)
            labels = rows(y, many if scale == 1 else many.flip(0))
            for _ in range(STATEFUL):
                own(forward(model, others), labels)
            ends.append(reduce(own(forward(model, x), y)))
    if torch.allclose(ends[0], ends[1], **near, equal_nan=True):
        return None
    return "a loss depends on batches before"


def _most(recipe: Recipe) -> int:
    """Twice as many examples as a step is expected to take."""
    plan = recipe.privacy
    return (
        min(2 * math.ceil(plan.batch_size) + 1, plan.max_batch)
        if isinstance(plan, SampleLevel)
        else 1
    )


def _room(x: Any) -> int:
    """Examples of which there is memory for what a model makes of them."""
    return ROOM // max(1, sum(t[:1].numel() for t in leaves(x)))


def _batches(count: int, recipe: Recipe, room: int) -> Iterator[Tensor]:
    """Pairs, few and many, of both classes, some twice; as many as a step may take, if there is room."""
    plan, most = recipe.privacy, _most(recipe)
    if isinstance(plan, SampleLevel):  # of more than max_batch no forward is ever taken
        most = max(most, min(plan.max_batch, room))
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


@contextmanager
def _at(scale: float) -> Iterator[None]:
    """What a model or loss does not take is no sign of mixing, unless it is the data's own size."""
    try:
        yield
    except Exception:
        if scale == 1:
            raise


def _another(loss: Loss) -> Loss:
    try:
        return copy.deepcopy(loss)
    except Exception:
        return loss


def _filled(output: Any, numbers: list[Tensor]) -> Any:
    """Other numbers in an output's place."""
    parts = iter(numbers)
    return _mapped(output, lambda t: next(parts) if t.is_floating_point() else t)


def _index(places: list[int]) -> Tensor:
    return torch.tensor(places)


def _losses(model: nn.Module, loss: Loss, x: Any, y: Any, index: Tensor) -> Tensor:
    return reduce(loss(forward(model, rows(x, index)), rows(y, index)))


def _loss(loss: Loss, output: Any, y: Any, index: Tensor) -> Tensor:
    n = size(y)
    return reduce(
        loss(_mapped(output, lambda t: t[index] if t.dim() and len(t) == n else t), rows(y, index))
    )


def _gradient(model: nn.Module, loss: Loss, x: Any, y: Any, index: Tensor) -> Tensor:
    model.zero_grad()
    _losses(model, loss, x, y, index).sum().backward()
    # a weight that the examples do not reach, as an expert not chosen, has no gradient
    every = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    found = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in every]
    return torch.cat([g.detach().flatten().double() for g in found])


def _differ(alone: list[Tensor], found: Tensor, index: Tensor, near: Any) -> bool:
    """Whether a watched example's loss is another in company; what is not finite is held to nothing."""
    for place, k in enumerate(index.tolist()[: 2 * WATCHED]):
        if not found.dim():  # alone it had a number of its own
            return True
        own = float(alone[k].flatten()[0]) if k < len(alone) else math.inf
        far = abs(float(found[place]) - own)
        if math.isfinite(own) and not far <= near["rtol"] * abs(own) + near["atol"]:
            return True
    return False


def _scaled(x: Any, scale: float) -> Any:
    return x if scale == 1 else _mapped(x, lambda t: t * scale if t.is_floating_point() else t)


def _among(x: Any, n: int, factor: float) -> Any:
    """The examples behind the watched ones so many times as large."""
    scale = torch.where(torch.arange(n) < WATCHED, 1.0, factor)

    def scaled(t: Tensor) -> Tensor:
        own = t.is_floating_point() and t.dim() and len(t) == n
        return t * scale.to(t).view(-1, *[1] * (t.dim() - 1)) if own else t

    return _mapped(x, scaled)


def _doubled(value: Any) -> Any:
    return _mapped(value, lambda t: t.double() if t.is_floating_point() else t)


def _mapped(batch: Any, fn: Any) -> Any:
    if isinstance(batch, Tensor):
        return fn(batch)
    if isinstance(batch, (dict, list, tuple)):
        parts = batch.values() if isinstance(batch, dict) else batch
        return rebuilt(batch, [_mapped(v, fn) for v in parts])
    return batch
