"""Random numbers that an example meets alike, alone and in company, so that trials can compare the two.

A model that draws, as a variational autoencoder does, gives other losses in every call. That says nothing
of whether examples mix. In a trial the numbers come from here: they hang on the call, and on the example.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedtorch import seeds
from fedtorch.recipe import Recipe
from fedtorch.training.module import undropped
from fedtorch.training.outline import untouched
from fedtorch.tree import size

UNIFORM = {torch.rand, torch.rand_like, Tensor.uniform_}
NORMAL = {torch.randn, torch.randn_like, torch.normal, Tensor.normal_}
WHOLE = {torch.randint, torch.randint_like}
COINS = {torch.bernoulli, Tensor.bernoulli}
METHODS: dict[Any, tuple[str, str]] = {
    Tensor.uniform_: ("from", "to"),
    Tensor.normal_: ("mean", "std"),
}
"""They write on their tensor, and are told how the numbers are spread."""


class Held(TorchFunctionMode):
    """Calls that draw give numbers of their own for each example, the same in every batch.

    Others, as ``torch.randperm``, draw as ever: what hangs on them differs from seed to seed.
    """

    def __init__(self, seed: int, examples: int = 1) -> None:
        """``seed``: another one, other numbers; ``examples``: how many there are in all."""
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
        kind = next((k for k in (UNIFORM, NORMAL, WHOLE, COINS) if func in k), None)
        if kind is None or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        given = func(*args, **kwargs)
        own = self._drawn(given, normal=kind is NORMAL)
        if kind is COINS:
            return (own < args[0]).to(given)
        if kind is WHOLE:
            low, high = _limits(func, args, kwargs)
            return (low + own * (high - low)).floor().to(given)
        zero, one = _parameters(func, args, kwargs)
        numbers = zero + own * (one if kind is NORMAL else one - zero)
        return given.copy_(numbers) if func in METHODS else numbers.to(given)

    def _drawn(self, given: Tensor, normal: bool) -> Tensor:
        """Numbers shaped like ``given``: a row for each example, or the same for all of them."""
        draw = seeds.generator(self.seed, "held", self.calls)
        self.calls += 1
        draws = torch.randn if normal else torch.rand
        dtype = given.dtype if given.is_floating_point() else torch.float64
        each = bool(given.dim()) and len(given) == len(self.index)
        shape = (self.examples, *given.shape[1:]) if each else given.shape
        table = draws(shape, generator=draw, dtype=dtype)
        return (table[self.index] if each else table).to(given.device)


def _parameters(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Of uniform numbers the limits, of normal ones mean and deviation."""
    if func is not torch.normal and func not in METHODS:
        return 0.0, 1.0
    names = METHODS.get(func, ("mean", "std"))
    told = dict(zip(names, args[func in METHODS :], strict=False)) | dict(kwargs)
    zero, one = told.get(names[0], 0.0), told.get(names[1], 1.0)
    return tuple(v.detach() if isinstance(v, Tensor) else v for v in (zero, one))  # type: ignore[return-value]


def _limits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """``randint(high, size)`` or ``randint(low, high, size)``; its like has a tensor in front."""
    numbers = [v for v in args if isinstance(v, int)]
    high = kwargs.get("high", numbers[-1] if numbers else 1)
    low = kwargs.get("low", numbers[0] if len(numbers) > ("high" not in kwargs) else 0)
    return low, high


def alike(examples: int) -> Held:
    """For ``with``: each example of a batch of so many draws the same numbers."""
    return Held(0).of(torch.zeros(examples, dtype=torch.int64))


def draws_numbers(model: nn.Module, batch: Any, recipe: Recipe, held: bool = False) -> bool:
    """Whether losses differ from call to call when nothing is dropped, or with what is drawn ``held``."""
    losses = []
    with untouched(model), torch.no_grad(), undropped(model):
        for seed in (0, 1):
            with seeds.seeded(seed), alike(size(batch)) if held else nullcontext():
                losses.append(recipe.tried(model, batch))
    return not torch.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-6, equal_nan=True)
