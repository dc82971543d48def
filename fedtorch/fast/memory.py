"""Memory for the clients' copies, lent to visit after visit: new pages cost more than filling them."""

import weakref

import numpy as np
import torch
from torch import Tensor

from fedtorch.fast.tuning import MEMORY_KEPT

LINE = 64
"""Bytes of a cache line: a vector that lies across two takes twice as long to load."""


class Memory:
    """Lends the same memory again and again, once nobody holds a tensor of it."""

    def __init__(self) -> None:
        """None yet."""
        self.held = np.empty(0, np.uint8)
        """Beginning on a cache line."""
        self.lent: weakref.ref[np.ndarray] | None = None

    def __reduce__(self) -> tuple[type["Memory"], tuple[()]]:
        """A worker has its own."""
        return Memory, ()

    def rows(self, start: Tensor, count: int) -> Tensor:
        """``start`` [numbers], ``count`` times: [count, numbers], each row on cache lines of its own."""
        return self.room(start, count)[:, : len(start)].copy_(start)

    def room(self, start: Tensor, count: int) -> Tensor:
        """The same with whatever is there, [count, width]: up to the next row's cache line."""
        width = len(start) + -len(start) % (LINE // start.element_size())
        size = count * width * start.element_size()
        if start.device.type == "cpu" and 0 < size <= MEMORY_KEPT and not self.busy():
            if len(self.held) < size:
                whole = np.empty(size + LINE, np.uint8)
                self.held = whole[-whole.ctypes.data % LINE :][:size]
            # torch keeps this view alive, and it the memory
            lent = self.held[:size].reshape(count, size // count)
            self.lent = weakref.ref(lent)
            return torch.from_numpy(lent).view(start.dtype)
        return start.new_empty(count, width)

    def busy(self) -> bool:
        """Whether a tensor of what was lent last is still alive."""
        return self.lent is not None and self.lent() is not None
