"""What the local steps of K clients leave: K models, or their sum and the norms of their changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fedtorch.tree import (
    add_weighted,
    expand,
    has_float64,
    moving,
    near,
    settled,
    split,
    sq_norms,
    to_float64,
)
from fedtorch.types import Params, Stack, Task


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
    """The weighted sum of changes of a model, and the latest change, all flat and in float64.

    Float64, because there the change of a float32 weight is exact. In place, because fresh memory costs
    as much as the arithmetic.
    """

    def __init__(self, start: Params) -> None:
        """``start``: the weights that changes are counted from."""
        device = next(iter(start.values())).device
        count = sum(v.numel() for v in start.values())
        self._start = torch.empty(count, dtype=torch.float64, device=device)
        self._change = torch.empty_like(self._start)
        self._sum = torch.empty_like(self._start)
        self._empty = True
        self._shapes = {k: v.shape for k, v in start.items()}
        self._pieces = [*split(self._change, self._shapes).values()]
        torch._foreach_copy_([*split(self._start, self._shapes).values()], [*start.values()])

    def see(self, weights: Params) -> float:
        """Take the change of ``weights``, in the order of ``start``; its squared norm."""
        torch._foreach_copy_(self._pieces, [*weights.values()])
        self._change.sub_(self._start)
        return float(self._change.dot(self._change))

    def add(self, weight: float) -> None:
        """Add ``weight`` times the latest change."""
        if self._empty:
            torch.mul(self._change, weight, out=self._sum)
            self._empty = False
        else:
            self._sum.add_(self._change, alpha=weight)

    def params(self, factor: float) -> Params:
        """``factor`` times the sum."""
        if self._empty:
            self._sum.zero_()
        return split(self._sum if factor == 1 else self._sum * factor, self._shapes)

    def bound(self, sq_norms: Tensor) -> Tensor:
        """No less than the exact squares."""
        return rounded_up(sq_norms, len(self._sum))


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
    """No less than the exact squares: a sum of n products errs by less than n 2^-53 of itself."""
    return sq_norms * (1 + (numbers + 8) * 2.0**-52)


def exact_weights(task: Task, names: Sequence[str]) -> Params:
    """The task's weights in float64, where that can be had."""
    if has_float64(task.state[names[0]].device):
        return task.exact(names)
    return to_float64(near({k: task.state[k] for k in names}))
