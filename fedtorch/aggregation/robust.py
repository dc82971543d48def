"""Rules that see each client's update, so that no single one moves the model as far as it likes."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtorch.tree import tmap
from fedtorch.types import Params, Released, Stack

COLUMNS = 1 << 16
"""Coordinates whose K values are ordered at once: what that takes beside the updates stays small."""

BUFFERS = "buffers"
"""The group in which a rule sees the changes of float buffers, which are as open to a liar as weights."""


@dataclass(frozen=True, kw_only=True)
class Robust(ABC):
    """A rule that is given each client's update; one of your own overrides ``combine``.

    Every client counts once, whatever it says of its size: who lies would say a billion.
    """

    linear: ClassVar[bool] = False

    @abstractmethod
    def combine(self, sent: dict[str, Stack]) -> dict[str, Params]:
        """What K clients sent, each group [K, ...] in float64 -> one of each.

        The groups are ``"delta"``, the strategy's own and, where visits moved any, ``"buffers"`` (changes
        too). Clients come in the order of their ids, on the CPU; none is NaN or infinite.
        """

    def start(self) -> "Rows":
        """No client yet."""
        return Rows(self.combine)


@dataclass(frozen=True, kw_only=True)
class Median(Robust):
    """Median of each coordinate (Yin et al. 2018, arXiv:1803.01498, Def. 1), every client counting once.

    Of an even number it is the mean of the middle two. It holds while fewer than half of the clients lie.
    """

    def combine(self, sent: dict[str, Stack]) -> dict[str, Params]:
        """Group by group, coordinate by coordinate."""
        return {group: tmap(median, stack) for group, stack in sent.items()}


def median(rows: Tensor) -> Tensor:
    """[K, ...] -> [...]; ``torch.median`` would take the lower of the middle two."""
    low, high = (len(rows) - 1) // 2, len(rows) // 2
    flat = rows.reshape(len(rows), rows[0].numel())
    parts = [part.sort(0).values for part in flat.split(COLUMNS, 1)]
    return torch.cat([(p[low] + p[high]) / 2 for p in parts]).view(rows.shape[1:])


class Rows:
    """Every client's update of one round, in float64 on the CPU: K x 8 bytes for each number sent."""

    def __init__(self, combine: Callable[[dict[str, Stack]], dict[str, Params]]) -> None:
        """Nothing added yet."""
        self._combine = combine
        self._ids: list[str] = []
        self._sent: dict[str, dict[str, list[Tensor]]] = {}
        self._buffers: list[tuple[int, Stack]] = []

    def add(self, update: Released) -> None:
        """Keep the clients of one chunk; raises TypeError where only their mean came."""
        if update.summed and len(update.ids) > 1:
            raise TypeError("a mean of several clients does not show each one's update")
        self._ids += update.ids
        for group, stack in update.sent.items():
            kept = self._sent.setdefault(group, {})
            for name, v in stack.items():
                kept.setdefault(name, []).append(_kept(v))
        own = {name: _kept(v) for name, v in update.buffers.items()}
        self._buffers.append((len(update.ids), own))

    def sums(self) -> dict[str, Params]:
        """Raises TypeError: noise for a sum says nothing of another rule's result."""
        raise TypeError("this rule takes no sum")

    def result(self, start: Params) -> tuple[dict[str, Params], Params]:
        """What the rule makes of each sent group, and of the buffers."""
        order = torch.tensor(sorted(range(len(self._ids)), key=self._ids.__getitem__))
        # name by name the parts are let go: the updates are held once, and one tensor of them twice
        sent = {
            group: {name: torch.cat(names.pop(name))[order] for name in [*names]}
            for group, names in self._sent.items()
        }
        moved = {name for _, own in self._buffers for name in own}
        at = {name: start[name].double().cpu() for name in sorted(moved)}
        changes = {name: torch.cat([*self._changes(name, v)])[order] for name, v in at.items()}
        found = self._combine(sent | ({BUFFERS: changes} if changes else {}))
        buffers = {name: v + at[name] for name, v in found.pop(BUFFERS, {}).items()}
        return found, buffers

    def _changes(self, name: str, start: Tensor) -> list[Tensor]:
        """A client sends the buffers that its chunk moved: it has the others as they were."""
        return [
            own[name] - start if name in own else start.new_zeros(count, *start.shape)
            for count, own in self._buffers
        ]


def _kept(v: Tensor) -> Tensor:
    # a copy: what a worker or a module sends, it overwrites with the next client
    return v.to("cpu", torch.float64, copy=True)
