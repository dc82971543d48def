"""The clients' batches side by side, so that all take their t-th step together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Which examples each client takes, step by step."""

    index: Tensor
    """[K, T], T = steps x batch: rows of all the chunk's examples; where a client has no example, any of
    its own."""
    local: Tensor
    """The same as rows of the client's own examples."""
    scale: Tensor
    """[K, T, 1]: 1 / size of the batch, and 0 where there is no example."""
    live: list[int]
    """Clients still training at each step; they come first, as those with most steps do."""
    batch: int

    @cached_property
    def counts(self) -> list[list[int]]:
        """Examples in each step of each client, [T / batch][K]."""
        real = self.scale[..., 0].unflatten(1, (-1, self.batch)) > 0
        return cast(list[list[int]], real.sum(2).T.tolist())


def schedule(
    plans: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype = torch.float32
) -> Schedule:
    """Put the clients' plans side by side, for weights of ``dtype``.

    The plans must come in order of falling length.
    """
    steps = [len(p) for p in plans]
    if steps != sorted(steps, reverse=True):
        raise ValueError("clients must come in order of falling number of steps")
    S, B = steps[0], max(p.shape[1] for p in plans)
    plans = [
        p if p.shape == (S, B) else F.pad(p, (0, B - p.shape[1], 0, S - len(p)), value=-1)
        for p in plans
    ]
    index = torch.stack(plans)
    real = index >= 0
    scale = real.to(dtype) / real.sum(2, keepdim=True).clamp(min=1)
    first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    local = index.clamp(min=0).flatten(1)
    live = [sum(t < s for s in steps) for t in range(S)]
    return Schedule(local + first[:, None], local, scale.flatten(1)[..., None], live, B)
