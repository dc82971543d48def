"""The clients' batches side by side, so that all take their t-th step together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LockstepOrder:
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
    counts: np.ndarray
    """Examples in each step of each client, [T / batch, K]."""

    def each(self) -> Iterator[tuple[slice, int]]:
        """Step by step: which of the T rows are in it, and how many clients are still training."""
        for t, k in enumerate(self.live):
            yield slice(t * self.batch, (t + 1) * self.batch), k

    @property
    def usual(self) -> float:
        """Examples of a client in a step, on average."""
        return float(self.counts.sum()) / sum(self.live)


def schedule(plans: Sequence[Tensor], starts: Tensor, weight: Tensor) -> LockstepOrder:
    """Put the clients' plans side by side, for weights of ``weight``'s type, and on its device.

    The plans must come in order of falling length; ``starts`` [K, 1]: each client's first row.
    """
    steps = [p.shape[0] for p in plans]
    if steps != sorted(steps, reverse=True):
        raise ValueError("clients must come in order of falling number of steps")
    S, B = steps[0], max(p.shape[1] for p in plans)
    plans = [
        p if p.shape == (S, B) else F.pad(p, (0, B - p.shape[1], 0, S - len(p)), value=-1)
        for p in plans
    ]
    index = torch.stack(plans)
    if int(index.min()) >= 0:
        local, counts = index.flatten(1), np.empty((S, len(plans)), np.int64)
        counts.fill(B)
        scale = torch.full((len(plans), S * B, 1), 1 / B, dtype=weight.dtype)
    else:
        real = index >= 0
        local, some = index.clamp(min=0).flatten(1), real.sum(2, keepdim=True)
        scale = (real.to(weight.dtype) / some.clamp(min=1)).flatten(1)[..., None]
        counts = some[..., 0].T.contiguous().numpy()
    alike = steps[-1] == S
    live = [len(plans)] * S if alike else [sum(t < s for s in steps) for t in range(S)]
    index = local + starts
    if weight.device.type != "cpu":
        index, local, scale = (t.to(weight.device) for t in (index, local, scale))
    return LockstepOrder(index, local, scale, live, B, counts)
