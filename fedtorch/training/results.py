"""What the local steps of K clients leave: K models, or their sum and the norms of their changes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fedtorch.training.reserve import Reserve
from fedtorch.tree import (
    add_weighted,
    expand,
    finite_per_client,
    has_float64,
    moving,
    near,
    settled,
    split,
    sq_norms,
    to_float64,
)
from fedtorch.types import Params, Stack, Task

BLOCK = 1 << 16
"""Numbers of a change that are looked at together: half of a megabyte."""


class Results(Protocol):
    """Of K clients' visits; K models are written down only if somebody asks for them."""

    @property
    def loss(self) -> Tensor:
        """Mean training loss over the visit's steps, [K], on the CPU."""

    def rows(self) -> tuple[Stack, Stack]:
        """Trainable weights and float buffers of each client, [K, ...] each."""

    def changes(self) -> Stack:
        """How far each client's trainable weights are from the shared ones, [K, ...], in their own type."""

    def settled(self) -> Tensor | None:
        """Whether each client's float buffers are finite or as they were, [K]; None: nothing to look at."""

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Squared norm of each client's change, [K], float64; not finite where the change is not.

        ``upper``: a bound that holds in spite of rounding, as clipping for privacy needs.
        """

    def weighted_sum(self, weight: Tensor) -> Params:
        """sum_k weight[k] * change[k]. A client of weight 0 is left out, so its change may be NaN."""

    def mean_buffers(self, weight: Tensor) -> Stack:
        """Weighted mean of the float buffers that any client moved, one row."""


@dataclass(frozen=True)
class Stacked:
    """K models."""

    params: Stack
    """Trainable weights, [K, ...]."""
    buffers: Stack
    """Float buffers, [K, ...]."""
    loss: Tensor
    task: Task
    """What they started from."""

    def rows(self) -> tuple[Stack, Stack]:
        """As they are."""
        return self.params, self.buffers

    def changes(self) -> Stack:
        """Of the weights that they started from."""
        start = near({k: self.task.state[k] for k in self.params})
        return {k: v - start[k] for k, v in self.params.items()}

    def settled(self) -> Tensor | None:
        """Whether each client's float buffers are finite or as they were."""
        return settled(self.buffers, self.task.state).cpu() if self.buffers else None

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Squared norm of each change, [K]."""
        squares = sq_norms(self._changes)
        if not upper:
            return squares
        return rounded_up(squares, sum(v[0].numel() for v in self.params.values()))

    def weighted_sum(self, weight: Tensor) -> Params:
        """The sum, in float64."""
        total, used = Params(), weight != 0
        if not used.any():
            return {k: torch.zeros_like(v[0]) for k, v in self._changes.items()}
        changes = self._changes if used.all() else {k: v[used] for k, v in self._changes.items()}
        add_weighted(total, changes, weight[used])
        return total

    def mean_buffers(self, weight: Tensor) -> Stack:
        """The mean, in float64."""
        total, used = Params(), weight != 0
        buffers = moving({k: v[used] for k, v in self.buffers.items()}, self.task.state)
        add_weighted(total, buffers, weight[used] / weight.sum())
        return expand(total)

    @cached_property
    def _changes(self) -> Stack:
        # in float64 the change of a float32 weight is exact
        start = exact_weights(self.task, [*self.params])
        return {k: v.double() - start[k] for k, v in self.params.items()}


class RunningSum:
    """The weighted sum of changes of a model, in float64, because there that of a float32 weight is exact.

    A change is never written down: it is taken by blocks that stay in the processor's cache.
    """

    def __init__(self, start: Params, reserve: Reserve) -> None:
        """``start``: the weights that changes are counted from, which nobody may change meanwhile."""
        device, sizes = next(iter(start.values())).device, {k: v.numel() for k, v in start.items()}
        self._start = self._weights = start
        self._numbers, self._empty = sum(sizes.values()), True
        if device.type == "cpu":
            self._sum = reserve.lend(self._numbers)
        else:
            self._sum = torch.empty(self._numbers, dtype=torch.float64, device=device)
        runs = _together(sizes)
        parts = self._sum.split([sum(sizes[k] for k in names) for names in runs])
        blocks = [
            (names, BLOCK * k, part)
            for names, whole in zip(runs, parts, strict=True)
            for k, part in enumerate(whole.split(BLOCK))
        ]
        most = max(len(part) for *_, part in blocks)
        room = torch.empty(2, most, dtype=torch.float64, device=device)
        self._blocks = [
            (*block, room[0, : len(block[2])], room[1, : len(block[2])]) for block in blocks
        ]
        """Names, where in a single one a block begins, its part of the sum, and room for two of it."""

    def see(self, weights: Params) -> float:
        """Take the change of ``weights``, which stay as they are until it is added; its squared norm."""
        self._weights = weights
        return float(torch.stack([change.dot(change) for change, _ in self._changes()]).sum())

    def add(self, weight: float) -> None:
        """Add ``weight`` times the latest change."""
        for change, part in self._changes():
            self._add(change, weight, part)
        self._empty = False

    def take(self, weights: Params, weight: float) -> float:
        """``see`` and ``add`` in one pass, of weights that are ``bounded``."""
        self._weights, squares = weights, []
        for change, part in self._changes():
            squares.append(change.dot(change))
            self._add(change, weight, part)
        self._empty = False
        return float(torch.stack(squares).sum())

    def _add(self, change: Tensor, weight: float, part: Tensor) -> None:
        if self._empty:
            torch.mul(change, weight, out=part)
        else:
            part.add_(change, alpha=weight)

    def params(self, factor: float) -> Params:
        """``factor`` times the sum."""
        if self._empty:
            self._sum.zero_()
        whole = self._sum if factor == 1 else self._sum * factor
        return split(whole, {k: v.shape for k, v in self._start.items()})

    def bound(self, sq_norms: Tensor) -> Tensor:
        """Of squared norms [K]: no less than the exact ones."""
        return rounded_up(sq_norms, self._numbers)

    def _changes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each block of the latest change, until the next one is asked for, and its part of the sum."""
        for names, first, part, change, start in self._blocks:
            for room, tree in ((change, self._weights), (start, self._start)):
                if len(names) == 1:
                    room.copy_(tree[names[0]].reshape(-1)[first : first + len(part)])
                else:
                    torch.cat([tree[k].reshape(-1) for k in names], out=room)
            yield change.sub_(start), part


def bounded(weights: Params) -> bool:
    """Whether no change of these weights has a square that float64 cannot hold."""
    narrow = all(v.dtype != torch.float64 for v in weights.values())
    return narrow and bool(finite_per_client(expand(weights)))


def _together(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, side by side while they fill no block: each would cost its calls."""
    found: list[list[str]] = []
    filled = BLOCK
    for name, size in sizes.items():
        filled += size
        if filled > BLOCK or not found:  # a first one may be of no numbers
            found.append([])
            filled = size
        found[-1].append(name)
    return found


@dataclass(frozen=True)
class Summed:
    """What is left of K visits of which only the sum was kept."""

    loss: Tensor
    squares: Tensor
    """Squared norm of each change, [K], float64; NaN where it or a float buffer is not finite."""
    used: Tensor
    """What each change was multiplied by, [K]; 0: it is not in the sum."""
    counted: Tensor
    """The same without the strategy's scale, [K]: what each client's buffers were multiplied by."""
    total: RunningSum
    floats: Params
    """The sum of the float buffers that any client moved."""

    def rows(self) -> tuple[Stack, Stack]:
        """Raises TypeError: a sum does not show each client's weights."""
        raise TypeError("only the sum of these clients was kept")

    def changes(self) -> Stack:
        """Raises TypeError, as above."""
        return self.rows()[0]

    def settled(self) -> None:
        """``squares`` say it."""

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Squared norm of each change, [K]."""
        return self.total.bound(self.squares) if upper else self.squares

    def weighted_sum(self, weight: Tensor) -> Params:
        """The sum; raises ValueError where it was taken with other weights than a multiple of these."""
        whole = float(self.used.sum())
        factor = float(weight.sum()) / whole if whole else 1.0
        if not torch.allclose(weight, self.used * factor, rtol=1e-6, atol=0):
            raise ValueError("these clients were summed with other weights")
        return self.total.params(factor)

    def mean_buffers(self, weight: Tensor) -> Stack:
        """The mean by the weights they were counted with."""
        return expand({k: v / self.counted.sum() for k, v in self.floats.items()})


def rounded_up(sq_norms: Tensor, numbers: int) -> Tensor:
    """No less than the exact squares, [K]: a sum of n products errs by less than n 2^-53 of itself."""
    return sq_norms * (1 + (numbers + 8) * 2.0**-52)


def exact_weights(task: Task, names: Sequence[str]) -> Params:
    """The task's weights in float64, where that can be had."""
    if has_float64(task.state[names[0]].device):
        return task.exact(names)
    return to_float64(near({k: task.state[k] for k in names}))
