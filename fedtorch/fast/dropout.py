"""Dropout with the very masks that each client would draw if it trained alone.

The general path seeds PyTorch's generator for each client's visit, and dropout draws from it, call after
call, a number for each of its input. Here every client has a generator of its own, seeded alike and asked
in the same order for masks of the same shape, so that both paths drop the same numbers.
"""

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fedtorch.fast.schedule import Schedule
from fedtorch.fast.spec import Dropout

MODULES: dict[object, int] = {nn.Dropout: 0, nn.Dropout1d: 3, nn.Dropout2d: 4, nn.Dropout3d: 5}
"""Layers, and the axes of their input where they drop whole channels of it."""

CALLS: dict[object, int] = {
    F.dropout: 0, torch.dropout: 0, F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5,
}  # fmt: skip
"""The same as functions."""

USUAL: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}


def dropout(node: fx.Node, root: nn.Module) -> Dropout | None:
    """What a node of a graph traced in training mode drops, at p = 0 nothing; None: it is no dropout."""
    if node.op == "call_module" and type(m := root.get_submodule(str(node.target))) in MODULES:
        axes, given = MODULES[type(m)], {k: getattr(m, k) for k in USUAL}
    elif node.op == "call_function" and node.target in CALLS:
        named = {"training" if k == "train" else k: v for k, v in node.kwargs.items()}
        axes, given = CALLS[node.target], dict(zip(USUAL, node.args[1:], strict=False)) | named
    else:
        return None
    given = USUAL | given
    return Dropout(given["p"] if given["training"] else 0.0, axes, given["inplace"])


class Coins:
    """Randomness of K clients, each with a generator of its own."""

    def __init__(self, seeds: Sequence[int], order: Schedule) -> None:
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
        self.noise = noise(a, order, self.keep, counts, self.coins.generators)
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
        self.keep, self.axes, self.order = 1 - spec.p, spec.axes, order

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[n, ...], the real examples of a step."""
        if self.axes:  # whole channels
            like = x.detach().flatten(2)[..., 0].view(*x.shape[:2], *[1] * (self.axes - 2))
            order = tuple(range(self.axes))
        else:
            like, order = x.detach(), self.order
        drawn = noise(like[None], (0, *(i + 1 for i in order)), self.keep, [len(x)], [generator])
        # general path and front keep images in different memory, and draw in the order of the former
        return x * torch.empty_like(like).copy_(drawn[0])


def noise(
    like: Tensor,
    order: tuple[int, ...],
    keep: float,
    counts: Sequence[int],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """What ``like`` [k, B, ...] is multiplied by: 0 or, with probability ``keep``, 1 / keep.

    Client j draws for its first ``counts[j]`` examples, in memory laid out in ``order`` as dropout does.
    """
    if keep == 0:  # PyTorch draws nothing either
        return torch.zeros_like(like)
    fast = uniform()
    draws = torch.empty_permuted(like.shape, order, dtype=torch.float64 if fast else like.dtype)
    if min(counts) < like.shape[1]:
        draws.zero_()
    for row, n, generator in zip(draws, counts, generators, strict=False):
        if n and fast:
            row[:n].uniform_(generator=generator)
        elif n:
            row[:n].bernoulli_(keep, generator=generator)
    return ((draws < keep).to(like.dtype) if fast else draws).div_(keep)


@cache
def uniform() -> bool:
    """Whether ``bernoulli_`` is a float64 uniform below p, which takes half the time to draw.

    It is not where it comes from MKL, on Intel's processors.
    """
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    coins = torch.empty(1000).bernoulli_(0.3, generator=theirs)
    same = torch.equal(coins, (torch.rand(1000, dtype=torch.float64, generator=ours) < 0.3).float())
    return same and torch.equal(ours.get_state(), theirs.get_state())
