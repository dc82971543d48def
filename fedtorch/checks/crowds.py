"""Which examples are tried together: how many at most, in what order, and how large their inputs are."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtorch.checks.company import WATCHED
from fedtorch.checks.tried import inputs
from fedtorch.recipe import Recipe
from fedtorch.tree import leaves

AFFORD = 6 << 30
"""Products that the largest batch for a model may take: a second, about."""

MOST_NUMBERS = 1 << 21
"""Numbers that the examples of the largest batch for a model may have."""


def most(recipe: Recipe) -> int:
    """Twice as many examples as a step is expected to take."""
    plan = recipe.privacy.per_example
    expected = math.ceil(plan.batch_size) if plan else 0
    return min(2 * expected + 1, _max_batch(recipe))


def affordable(batch: Any, recipe: Recipe, work: int) -> int:
    """Examples of the largest batch: as many as a step may take, if there is memory and time for them."""
    room = MOST_NUMBERS // max(1, sum(t[:1].numel() for t in leaves(batch)))
    return max(most(recipe), min(_max_batch(recipe), room, AFFORD // work))


def _max_batch(recipe: Recipe) -> int:
    """Of more examples no forward is ever taken."""
    plan = recipe.privacy.per_example
    return plan.max_batch if plan else 1


def places(count: int, most: int) -> Iterator[Tensor]:
    """Pairs, few and many of ``count`` examples, of both classes, some twice: their places."""
    places: Sequence[int]
    for places in (
        [0, 1],
        [1, 0],
        [0, 2, 3],
        [3, 0, 0, 1],
        [2, 2, 1, 1, 0],
        range(max(count, most)),
    ):
        yield torch.tensor([k % count for k in places])


def enlarged(batch: Any, scale: float) -> Any:
    """The batch with inputs so many times as large."""
    if scale == 1:
        return batch
    return inputs(lambda t: t * scale if t.is_floating_point() else t, batch)


def among(batch: Any, n: int, factor: float) -> Any:
    """The examples behind the watched ones so many times as large; with 0 whole numbers are zeros too."""
    scale = torch.where(torch.arange(n) < WATCHED, 1.0, factor)

    def larger(t: Tensor) -> Tensor:
        own = (t.is_floating_point() or not factor) and t.dim() and len(t) == n
        return t * scale.to(t).view(-1, *[1] * (t.dim() - 1)) if own else t

    return inputs(larger, batch)


def alike(batch: Any) -> Any:
    """The batch with ones for whole numbers: of two kinds in every example, none has what another lacks."""
    return inputs(lambda t: t if t.is_floating_point() else torch.ones_like(t), batch)
