"""Random numbers that an example meets alike, alone and in company, so that trials can compare the two.

A model that draws, as a variational autoencoder does, gives other losses in every call. That says nothing
of whether examples mix. In a trial the numbers come from here: they hang on the call, and on the example.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedtorch import seeds
from fedtorch.recipe import Recipe
from fedtorch.training.module import undropped
from fedtorch.training.outline import untouched
from fedtorch.tree import size

DRAWS: dict[Any, tuple[str, tuple[str, ...]]] = {
    torch.rand: ("uniform", ()),
    torch.rand_like: ("uniform", ()),
    Tensor.uniform_: ("uniform", ("self", "from", "to")),
    torch.randn: ("normal", ()),
    torch.randn_like: ("normal", ()),
    torch.normal: ("normal", ("mean", "std")),
    Tensor.normal_: ("normal", ("self", "mean", "std")),
    torch.bernoulli: ("coin", ("input", "p")),
    Tensor.bernoulli: ("coin", ("input", "p")),
    Tensor.bernoulli_: ("coin", ("self", "p")),
    torch.randint: ("whole", ()),
    torch.randint_like: ("whole", ()),
    Tensor.exponential_: ("wait", ("self", "lambd")),
}
"""Calls that draw: what kind of numbers, and the names of what they are told by place."""

SPREAD = {"uniform": ("from", "to"), "normal": ("mean", "std")}
"""The arguments that say how numbers are spread: 0 and 1 where nothing is said."""

EXTREMES = (1e-6, 1 - 1e-6)
"""Least and largest uniform number: what is done rarely is often done where one is small, or large."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, less their whole part, leave no large gap in [0, 1]."""


class RowDraws(TorchFunctionMode):
    """Calls that draw give numbers of their own for each example, the same in every batch.

    Others, as ``torch.randperm``, draw as ever: what hangs on them differs from seed to seed.
    """

    def __init__(self, seed: int, examples: int = 1) -> None:
        """``seed``: another one, other numbers; ``examples``: how many there are in all.

        What is done with a small chance must be met. So with seed 1 all numbers are as small as they get,
        with 2 as large, with 3, 6, ... each small or large by a coin, and from one of the other seeds
        to the next every number wanders over all that it may be.
        """
        super().__init__()
        self.seed, self.examples = seed, examples
        self.calls, self.index = 0, torch.zeros(1, dtype=torch.int64)

    def of(self, index: Tensor) -> Self:
        """For the next batch, which has the examples at ``index``."""
        self.calls, self.index = 0, index
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Only calls that draw are changed."""
        kwargs = kwargs or {}
        if func is F.gumbel_softmax:  # no mode hears what it calls
            return self._gumbel(*args, **kwargs)
        if func not in DRAWS or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        kind, names = DRAWS[func]
        given = func(*args, **kwargs)
        own = self._drawn(given, normal=kind == "normal")
        told = dict(zip(names, args, strict=False)) | kwargs
        if kind == "coin":
            numbers = own < told.get("p", told.get("input", 0.5))
        elif kind == "whole":
            low, high = _limits(args, kwargs)
            numbers = (low + own * (high - low)).floor()
        elif kind == "wait":
            numbers = -own.log() / told.get("lambd", 1.0)
        else:
            ends = (told.get(n, v) for n, v in zip(SPREAD[kind], (0.0, 1.0), strict=True))
            zero, one = (v.detach() if isinstance(v, Tensor) else v for v in ends)
            numbers = zero + own * (one if kind == "normal" else one - zero)
        return given.copy_(numbers) if names[:1] == ("self",) else numbers.to(given)

    def _drawn(self, given: Tensor, normal: bool) -> Tensor:
        """Numbers shaped like ``given``: a row for each example, or the same for all of them."""
        draw = seeds.generator(0, "held", self.calls)
        coin = seeds.generator(self.seed, "ends", self.calls)
        self.calls += 1
        dtype = given.dtype if given.is_floating_point() else torch.float64
        each = bool(given.dim()) and len(given) == len(self.index)
        shape = (self.examples, *given.shape[1:]) if each else given.shape
        table = torch.rand(shape, generator=draw, dtype=torch.float64)
        table = self._moved(table, torch.rand(shape, generator=coin)).clamp(*EXTREMES)
        table = (torch.special.ndtri(table) if normal else table).to(dtype)
        return (table[self.index] if each else table).to(given.device)

    def _gumbel(
        self, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 0, dim: int = -1
    ) -> Tensor:
        """As torch has it."""
        drawn = -(-self._drawn(logits, normal=False).log()).log()
        soft = ((logits + drawn) / tau).softmax(dim)
        if not hard:
            return soft
        chosen = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
        return chosen - soft.detach() + soft

    def _moved(self, table: Tensor, coins: Tensor) -> Tensor:
        """Uniform numbers as they are with this seed."""
        if self.seed in (1, 2):
            return torch.full_like(table, self.seed - 1)
        moved = (table + GOLDEN * self.seed) % 1
        if self.seed % 3 or not self.seed:
            return moved
        return (coins < 0.5).to(table)


def _limits(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """``randint(high, size)`` or ``randint(low, high, size)``; its like has a tensor in front."""
    numbers = [v for v in args if isinstance(v, int)]
    high = kwargs.get("high", numbers[-1] if numbers else 1)
    low = kwargs.get("low", numbers[0] if len(numbers) > ("high" not in kwargs) else 0)
    return low, high


def same_draws(examples: int) -> RowDraws:
    """For ``with``: each example of a batch of so many draws the same numbers."""
    return RowDraws(0).of(torch.zeros(examples, dtype=torch.int64))


def draws_numbers(model: nn.Module, batch: Any, recipe: Recipe, held: bool = False) -> bool:
    """Whether losses differ from call to call when nothing is dropped, or with what is drawn ``held``."""
    losses = []
    with untouched(model), torch.no_grad(), undropped(model):
        for seed in (0, 1):
            with seeds.seeded(seed), same_draws(size(batch)) if held else nullcontext():
                losses.append(recipe.tried(model, batch))
    return not torch.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-6, equal_nan=True)
