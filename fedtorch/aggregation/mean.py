"""The weighted mean of what clients send, built up as updates arrive, and the step it leads to."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedtorch.tree import add_weighted, all_finite
from fedtorch.types import Params, Released, Stack

Held = dict[str, Params]
"""What an aggregator keeps on the server from round to round, by group."""


class Gathering(Protocol):
    """One round's updates, as they arrive, and what comes of them."""

    held: Held
    """What the next round is to start with."""
    figures: dict[str, Any]
    """What else there is to tell of the round: ids of clients that were left out, and the like."""

    def add(self, update: Released) -> None:
        """Add the clients of one chunk."""

    def sums(self) -> dict[str, Params]:
        """Weighted sum of each sent group, for noise that is made for a sum."""

    def result(self, start: Params) -> tuple[dict[str, Params], Params]:
        """What each sent group and the float buffers come to; ``start``: the state they trained from."""


class HiddenSum(Gathering, Protocol):
    """A sum of which the server sees no client's own part, and which enough of them must open."""

    def expect(self, asked: int, privacy: Any, clip: float) -> None:
        """So many clients are asked; ``clip``: the clipping norm of this round."""

    def short(self) -> bool:
        """Whether too few have reported for anything to be opened."""


class Aggregator(Protocol):
    """How what clients send becomes one change of the model: a frozen dataclass of options."""

    linear: ClassVar[bool]
    """A weighted sum will do: no client's update is needed by itself (``Recipe.needs_rows``)."""

    def start(
        self, held: Held | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> Gathering:
        """Nothing gathered yet, for one round.

        ``held``: of the round before; ``seed`` for draws; ``dtype``: of the weights, in which updates may
        be kept.
        """


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean, weighed as the strategy says."""

    linear: ClassVar[bool] = True

    def start(
        self, held: Held | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> "RunningMean":
        """An empty sum."""
        return RunningMean()


class RunningMean:
    """Running weighted sums in float64; K updates never have to be held at once."""

    def __init__(self) -> None:
        """Nothing added yet."""
        self.held, self.figures = Held(), dict[str, Any]()
        self.weight = 0.0
        self.sent: dict[str, Params] = {}
        self.buffers: Params = {}
        self._came: dict[str, float] = {}
        """Weight of the clients that sent each buffer."""
        self._first: Released | None = None

    def add(self, update: Released) -> None:
        """Add the clients of one chunk."""
        if update.summed and not self.weight:
            self._first = update  # often the only one, and a mean as it is
        else:
            self._fold()
            self._add(update)
        self.weight += float(update.weight.sum())

    def _fold(self) -> None:
        if self._first is not None:
            self._add(self._first)
            self._first = None

    def _add(self, update: Released) -> None:
        weight = update.weight.sum()[None] if update.summed else update.weight
        for group, stack in update.sent.items():
            add_weighted(self.sent.setdefault(group, {}), stack, weight)
        add_weighted(self.buffers, update.buffers, weight)
        for name in update.buffers:
            self._came[name] = self._came.get(name, 0.0) + float(update.weight.sum())

    def sums(self) -> dict[str, Params]:
        """Weighted sum of each sent group, on the CPU."""
        self._fold()
        return {g: {k: v.cpu() for k, v in s.items()} for g, s in self.sent.items()}

    def result(self, start: Params | None = None) -> tuple[dict[str, Params], Params]:
        """Mean of each sent group and of the float buffers, on the CPU; in float64 if there were many.

        A client sends the buffers that its chunk moved: it has the others as they were in ``start``.
        """
        if self._first is not None:
            one = self._first
            return {g: _one_row(s) for g, s in one.sent.items()}, _one_row(one.buffers)
        return (
            {g: {k: (v / self.weight).cpu() for k, v in s.items()} for g, s in self.sent.items()},
            {k: self._buffer(k, v.cpu(), start or {}) for k, v in self.buffers.items()},
        )

    def _buffer(self, name: str, total: Tensor, start: Params) -> Tensor:
        others = self.weight - self._came[name]
        if others:
            total = total + others * start[name].double().cpu()
        return total / self.weight


def _one_row(stack: Stack) -> Params:
    return {k: v[0].cpu() for k, v in stack.items()}


def added(state: Params, delta: Params, buffers: Params) -> Params | None:
    """``state`` with ``delta`` added and ``buffers`` in place of its own.

    None when the result is not finite.
    """
    old = [state[k] for k in delta]
    if old and all(v.dtype == w.dtype for v, w in zip(old, delta.values(), strict=True)):
        new = dict(zip(delta, torch._foreach_add(old, [*delta.values()]), strict=True))
    else:
        new = {k: _plus(state[k], v) for k, v in delta.items()}
    if not all_finite(new):
        return None
    # float statistics are averaged; integer counters keep the server's value
    return state | new | {k: v.to(state[k].dtype) for k, v in buffers.items()}


def _plus(value: Tensor, step: Tensor) -> Tensor:
    if step.dtype == value.dtype:
        return value + step
    # added in float64 and rounded once: one client's own weights come back to the last bit
    return value.double().add_(step).to(value.dtype)
