"""Dropout with the masks of ``fedtorch.training.dropout``: those that each client would draw alone."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from fedtorch.fast.schedule import LockstepOrder
from fedtorch.training.dropout import CALLS, USUAL, Dropout, dropout_mask, dropout_of

MODULES: dict[object, int] = {nn.Dropout: 0, nn.Dropout1d: 3, nn.Dropout2d: 4, nn.Dropout3d: 5}
"""Layers, and the axes of their input where they drop whole channels of it."""


def dropout(node: fx.Node, root: nn.Module) -> Dropout | None:
    """What a node of a graph traced in training mode drops, at p = 0 nothing; None: it is no dropout."""
    if node.op == "call_module" and type(m := root.get_submodule(str(node.target))) in MODULES:
        return dropout_of(MODULES[type(m)], (), {name: getattr(m, name) for name in USUAL})
    if node.op == "call_function" and node.target in CALLS:
        return dropout_of(CALLS[node.target], node.args, node.kwargs)
    return None


class Coins:
    """Randomness of K clients, each with a generator of its own."""

    def __init__(self, seeds: Sequence[int], order: LockstepOrder) -> None:
        """``seeds``: what the general path would seed each client's visit with."""
        self.seeds, self.order = seeds, order

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """Made when they are asked for: many models drop nothing."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


class Drop:
    """Dropout between two dense layers."""

    def __init__(self, spec: Dropout, coins: Coins) -> None:
        self.keep, self.coins, self.t = 1 - spec.p, coins, 0

    def forward(self, a: Tensor) -> Tensor:
        """[k, B, F]; draws for real examples alone."""
        counts, order = self.coins.order.counts[self.t][: len(a)], tuple(range(a.dim()))
        self.t += 1
        self.noise = dropout_mask(a, order, self.keep, counts, self.coins.generators)
        return a * self.noise

    def backward(self, d: Tensor) -> Tensor:
        """What was dropped has no gradient."""
        return d * self.noise

    def step(self, d: Tensor) -> None:
        """Nothing to move."""


class Masked(nn.Module):
    """Dropout in the front: one client at a time, through autograd."""

    def __init__(self, spec: Dropout, order: tuple[int, ...]) -> None:
        """``order``: axes of the input as they lie in memory on the general path, outermost first."""
        super().__init__()
        self.keep, self.axes = 1 - spec.p, spec.axes
        self.order = (0, *(i + 1 for i in (range(spec.axes) if spec.axes else order)))

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[n, ...], the real examples of a step."""
        shape = (*x.shape[:2], *[1] * (self.axes - 2)) if self.axes else x.shape  # whole channels
        like = x.detach().new_empty(1).expand(1, *shape)
        drawn = dropout_mask(like, self.order, self.keep, [len(x)], [generator])[0]
        # general path and front keep images in different memory, and draw in the order of the former
        return x * (drawn if self.axes else torch.empty_like(x).copy_(drawn))
