"""Dropout's masks for several clients at once, each with the numbers that its own generator would draw.

Where one client trains, PyTorch's generator is seeded for its visit, and dropout draws from it, call after
call, a number for each of its input. Where many train together, every client has a generator of its own,
seeded alike and asked in the same order for masks of the same shape, so that the same numbers drop.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CALLS: dict[object, int] = {
    F.dropout: 0, torch.dropout: 0, F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5,
}  # fmt: skip
"""Functions, and the axes of their input where they drop whole channels of it."""

USUAL: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
"""What they are given besides, in this order."""


@dataclass(frozen=True)
class Dropout:
    """Numbers are zero with probability ``p``, the others divided by 1 - p."""

    p: float
    axes: int = 0
    """Of the input, where whole channels of it are zero; 0: single numbers are."""
    inplace: bool = False


def dropout_of(axes: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dropout:
    """What a call drops; one that is switched off drops nothing, with p = 0."""
    named = {"training" if k == "train" else k: v for k, v in kwargs.items()}
    given = USUAL | dict(zip(USUAL, args[1:], strict=False)) | named
    return Dropout(given["p"] if given["training"] else 0.0, axes, given["inplace"])


def dropout_mask(
    like: Tensor,
    order: tuple[int, ...],
    keep: float,
    counts: Sequence[int],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draws a dropout mask shaped like ``like`` [k, B, ...]: 1 / keep with probability ``keep``, else 0.

    Each client has a generator of its own. Client j draws for its first ``counts[j]`` examples, in memory
    laid out in ``order``, as PyTorch's dropout does.
    """
    if keep == 0:  # PyTorch draws nothing either
        return torch.zeros_like(like)
    fast, most = uniform(), like.shape[1]
    draws = torch.empty_permuted(like.shape, order, dtype=torch.float64 if fast else like.dtype)
    if min(counts) < most:
        draws.zero_()
    for row, n, generator in zip(draws, counts, generators, strict=False):
        real = row if n == most else row[:n]
        if n and fast:
            real.uniform_(generator=generator)
        elif n:
            real.bernoulli_(keep, generator=generator)
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


def dropped(
    noise: Callable[[Tensor, Dropout], Tensor],
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Any call of torch; where it is dropout's, its input times ``noise`` of input and what it drops."""
    if func not in CALLS or not args:
        return func(*args, **kwargs)
    x, drop = args[0], dropout_of(CALLS[func], args, kwargs)
    if drop.axes not in (0, x.dim()):  # an input that is not a batch
        return func(*args, **kwargs)
    return x * noise(x.detach(), drop) if drop.p else x


class Drawing(TorchFunctionMode):
    """Dropout under ``torch.func.vmap`` over clients draws for each from a generator of its own."""

    def __init__(self, seeds: Sequence[int]) -> None:
        """``seeds``: what would seed the visit of each client that trained alone; none: vmap draws."""
        super().__init__()
        self.seeds, self.counts = seeds, list[int]()
        self.used = False
        """Whether anything was dropped."""

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """Made when they are asked for."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def begin(self, mask: Tensor) -> str:
        """A step with the examples in ``mask`` [K, B], in which the others draw nothing.

        Returns the ``randomness`` that vmap is to have.
        """
        # listening to a model that drops nothing costs some per cent, so its first step is the last
        self.silent = not self.seeds or (bool(self.counts) and not self.used)
        self.counts, self.rows = mask.sum(1).tolist(), mask.shape[1]
        # "same": to vmap a draw from a client's own generator looks like one for all
        return "different" if self.silent else "same"

    def at(self, client: Tensor, example: Tensor | None = None) -> AbstractContextManager[object]:
        """Within vmap: the model is run for this client, and perhaps for this example alone."""
        self.client, self.example = client[None], None if example is None else example[None]
        return nullcontext() if self.silent else self

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Only dropout's calls are changed."""
        return dropped(self.noise, func, args, kwargs or {})

    def noise(self, x: Tensor, drop: Dropout) -> Tensor:
        """For x [B, ...] of one client, or [1, ...]; drawn for all, of which it takes its own."""
        self.used = True
        shape, order = mask_shape(x, drop)
        like = torch.empty(1, dtype=x.dtype).expand(len(self.seeds), self.rows, *shape)
        rows = dropout_mask(like, order, 1 - drop.p, self.counts, self.generators)
        own = rows.index_select(0, self.client)[0]
        return own if self.example is None else own.index_select(0, self.example)


class Replaying(TorchFunctionMode):
    """Dropout for the examples of a batch one after another, with the masks the batch would have."""

    def __init__(self, rows: int) -> None:
        """``rows``: examples of the batch; masks come from PyTorch's own generator."""
        super().__init__()
        self.rows, self.masks = rows, list[Tensor]()

    def of(self, example: int) -> Self:
        """For ``with``: the model is run for this example alone."""
        self.example, self.calls = example, 0
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Only dropout's calls are changed."""
        return dropped(self.noise, func, args, kwargs or {})

    def noise(self, x: Tensor, drop: Dropout) -> Tensor:
        """Of this call for the example that is run."""
        if self.calls == len(self.masks):  # the first example meets each call first
            shape, order = mask_shape(x, drop)
            like = torch.empty(1, dtype=x.dtype).expand(1, self.rows, *shape)
            generators = [torch.default_generator]
            self.masks.append(dropout_mask(like, order, 1 - drop.p, [self.rows], generators)[0])
        self.calls += 1
        return self.masks[self.calls - 1][self.example, None]


def mask_shape(x: Tensor, drop: Dropout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What of an example of x [B, ...] has a number of its own, and how [K, B, ...] lies in memory."""
    shape, order = tuple(x.shape[1:]), x.dim_order()
    if drop.axes:  # whole channels
        shape, order = (shape[0], *[1] * (drop.axes - 2)), tuple(range(drop.axes))
    return shape, (0, *(i + 1 for i in order))
