"""Canary clients: updates of an audit's own in the sum that the server noises, and what comes out of each.

A canary client is in the run by a fair coin; if it is, it is drawn for a round as any client is, and sends
a vector far longer than the clipping norm, in a direction of its own. Directions have no weight in common,
so that they are orthogonal. Whoever attacks sees each noised mean and knows all other clients' updates:
their sum is taken off, since among few clients their common drift would drown any canary (Andrew et al.
2023, arXiv:2302.03098).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch.privacy.base import Privacy
from fedtorch.privacy.findings import CanaryResults
from fedtorch.types import Params, Raw, Stack, Task

LONG = 1e6
"""Norm of a canary's update before it is clipped, and the number of examples it says it has."""


@dataclass
class CanaryClients:
    """All of a run, at the server."""

    plan: Privacy
    like: Params
    """Names and shapes of a client's update."""
    count: int
    state: dict[str, Any] = field(default_factory=dict)
    """Coins, and what was seen so far: for the checkpoint."""

    def __post_init__(self) -> None:
        """Directions and coins."""
        self.numbers = sum(v.numel() for v in self.like.values())
        if self.state:
            return
        draw = self.plan.stream("canaries")
        zeros = torch.zeros(self.count, dtype=torch.float64)
        self.state = {
            "order": torch.argsort(draw.uniform(self.numbers)),
            "inside": draw.uniform(self.count) < 0.5,
            "sent": zeros,
            "noise": torch.zeros(self.numbers, dtype=torch.float64),
            **dict.fromkeys(("squares", "variance", "clip", "clip_squares", "longest"), 0.0),
            "rounds": 0,
        }

    def direction(self, k: int) -> Tensor:
        """Of norm 1, alike on every weight that is canary k's."""
        own = self.state["order"][k :: self.count]
        found = torch.zeros(self.numbers, dtype=torch.float64)
        found[own] = 1 / math.sqrt(len(own))
        return found

    def along(self, vector: Tensor) -> Tensor:
        """How long a vector is in each direction, [count]."""
        place = torch.arange(self.numbers) % self.count
        sizes = torch.bincount(place, minlength=self.count).double()
        sums = torch.bincount(place, vector[self.state["order"]], self.count)
        return sums / sizes.sqrt()

    def join(self, total: Any, task: Task, weigh: Callable[[Tensor], Tensor]) -> None:
        """Those that are drawn send their update: clipped and weighed as any client's, and added.

        ``weigh``: the weights of clients with so many examples.
        """
        before = self.flat(total.sums())
        for k in self.plan.cohort(self.count, task.round) or []:
            if self.state["inside"][k]:
                examples = torch.tensor([LONG])
                long = {"delta": self.shaped(LONG * task.privacy["clip"] * self.direction(k))}
                raw = Raw((f"canary {k}",), examples, weigh(examples), {}, None, long, None)
                total.add(self.plan.release(raw, task)[0])
        self._sum = self.flat(total.sums()).clone()
        sent = self.along(self._sum - before)
        self.state["sent"] = self.state["sent"] + sent
        clip = task.privacy["clip"]
        longest = float(sent.abs().max()) / clip
        self.state["longest"] = max(self.state["longest"], longest)
        self.state["clip"] += clip
        self.state["clip_squares"] += clip * clip

    def noised(self, mean: Mapping[str, Params], divisor: float, std: float) -> None:
        """What the noise was: the mean times its public ``divisor``, less the sum; ``std`` is claimed."""
        noise = self.flat(mean) * divisor - self._sum
        state = self.state
        state["noise"] = state["noise"] + noise
        state["squares"] += float(noise @ noise) / (std * std)
        state["variance"] += std * std
        state["rounds"] += 1

    def flat(self, groups: Mapping[str, Params]) -> Tensor:
        """The update in one row; of nobody's, zeros."""
        delta = groups.get("delta", {})
        parts = [
            delta[n].double().flatten()
            if n in delta
            else torch.zeros(v.numel(), dtype=torch.float64)
            for n, v in self.like.items()
        ]
        return torch.cat(parts)

    def shaped(self, row: Tensor) -> Stack:
        """The other way round, as one client's."""
        parts = row.split([v.numel() for v in self.like.values()])
        return {n: p.view(1, *v.shape) for (n, v), p in zip(self.like.items(), parts, strict=True)}

    def seen(self, rate: float, due: int) -> CanaryResults:
        """What the canaries show, held to a claim; ``due``: rounds that the ledger charges."""
        state, rounds = self.state, self.state["rounds"]
        std = math.sqrt(state["variance"]) or 1.0
        scores = (self.along(state["noise"]) + state["sent"]).numpy() / std
        wander = rate * (1 - rate) * state["clip_squares"] / (std * std)
        return CanaryResults(
            unit="client",
            inside=state["inside"].numpy(),
            scores=scores,
            shift=np.full(self.count, rate * state["clip"] / std),
            wander=np.full(self.count, wander),
            noise=float(state["noise"].square().mean().sqrt()) / std,
            numbers=self.numbers if rounds else 0,
            step_noise=math.sqrt(state["squares"] / max(1, self.numbers * rounds)),
            step_numbers=self.numbers * rounds,
            longest=state["longest"],
            missed=due - rounds,
        )
