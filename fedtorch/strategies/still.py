"""A visit in which nothing is learned: it shows in names and shapes what a strategy's clients send."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtorch.strategies.base import Strategy
from fedtorch.tree import expand, row
from fedtorch.types import NUMBERS, Context, Params, Stack


def uploads(strategy: Strategy, params: Params, extras: dict[str, Params]) -> dict[str, Params]:
    """What a client uploads, in names and shapes: an upload of a visit that changed nothing."""
    ctx = still(strategy, params, extras)
    return {g: row(s, 0) for g, s in strategy.upload(expand(params), ctx)[0].items()}


def sends(strategy: Strategy, params: Params, extras: dict[str, Params]) -> dict[str, Params]:
    """All that a client sends, in names and shapes: what it uploads, and its numbers."""
    found = uploads(strategy, params, extras)
    numbers = strategy.numbers(still(strategy, params, extras), torch.ones(1).double())
    return found | ({NUMBERS: {n: v.double()[0] for n, v in numbers.items()}} if numbers else {})


def still(strategy: Strategy, params: Params, extras: Mapping[str, Params]) -> Context:
    """What a strategy sees of a client's first visit, before any step."""
    own = {g: expand(m) for g, m in strategy.remember(params).items()}
    shared = {g: expand(e) for g, e in extras.items()}
    return Context(expand(params), shared, own, torch.ones(1), 1.0, (0,), data=Silent(params))


@dataclass(frozen=True)
class Silent:
    """One client's data before anybody looks at them: a loss of one, and no gradient."""

    params: Params

    def loss(self, at: Stack | None = None) -> Tensor:
        """One."""
        return torch.ones(1).double()

    def grad(self, at: Stack | None = None, step: int | None = None) -> tuple[Stack, Tensor]:
        """Zeros."""
        return {k: torch.zeros_like(v)[None] for k, v in self.params.items()}, self.loss()

    def among(self, places: Sequence[int]) -> "Silent":
        """There is one."""
        return self
