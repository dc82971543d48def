"""Memory of a model's size, kept from round to round: the system's pages would cost as much as a sum."""

import weakref
from typing import Any

import torch
from torch import Tensor

MOST = 2
"""Blocks that are kept: the sum of one chunk is still there while that of the next is taken."""

Lent = weakref.ReferenceType[Any]
"""To the array that a block was lent through."""


class Reserve:
    """Blocks of float64 on the CPU, lent to one sum after another.

    Guarantee: what somebody still holds, or a view of it, is never lent again. A block is free once torch
    has let go of the array that it was lent through, and every view keeps that.
    """

    def __init__(self) -> None:
        """Nothing kept yet."""
        self._kept: list[tuple[Tensor, Lent]] = []
        """Blocks, and whether each is lent: then it leads to something."""

    def lend(self, numbers: int) -> Tensor:
        """So many numbers, [numbers], that may hold anything: new ones where no such block is free."""
        kept = [(block, lent) for block, lent in self._kept if len(block) == numbers]
        found = next((block for block, lent in kept if lent() is None), None)
        if found is None:
            found = torch.empty(numbers, dtype=torch.float64)
        array = found.numpy()  # another each time
        others = [(block, lent) for block, lent in kept if block is not found]
        self._kept = [*others, (found, weakref.ref(array))][-MOST:]
        return torch.from_numpy(array)

    def clear(self) -> None:
        """Keep nothing; what is lent stays with whoever holds it."""
        self._kept = []
