"""Who is under way as a simulated clock runs, and how often each client has come."""

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from fedtorch import seeds
from fedtorch.rounds.clock import begins, shares, work_of
from fedtorch.types import ConfigError

Flight = tuple[float, int, int, int, int]
"""(arrival in seconds, number of the visit, client, round of its model, visits to that model before)."""


@dataclass
class Sky:
    """A clock at work; made of plain values, and of them again."""

    clock: Any
    asked: Any
    """``rounds.synchronous.Demands``."""
    now: float = 0.0
    sent: int = 0
    """Visits begun so far: each has a number of its own."""
    under_way: list[Flight] = field(default_factory=list)
    came: list[int] = field(default_factory=list)
    """Visits of each client that have counted so far."""
    fresh: dict[int, list[int]] = field(default_factory=dict)
    """Clients that were sent this round's model, by how often before."""
    times: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """A heap, and copies: a round that fails is tried again from where it began."""
        self.under_way = sorted(self.under_way)
        self.came = [*self.came] or [0] * len(self.asked.sizes or ())

    def kept(self) -> dict[str, Any]:
        """For the next step."""
        flights = sorted(self.under_way)
        return {"now": self.now, "sent": self.sent, "under_way": flights, "came": self.came}

    def figures(self) -> dict[str, float]:
        """The clock, and how often clients came."""
        return {"simulated_seconds": self.now, **shares(self.came)}

    def send(self, client: int, round: int, seed: int) -> None:
        """The model to this client, who sets out as soon as it is there."""
        work = work_of(self.asked.recipe, self.asked.sizes[client])
        took = self.clock.seconds(client, self.sent, work, self.asked.bytes, seed)
        visit = self.times[client]
        lands = begins(self.clock, client, self.now) + took
        heapq.heappush(self.under_way, (lands, self.sent, client, round, visit))
        self.fresh.setdefault(visit, []).append(client)
        self.times[client] += 1
        self.sent += 1

    def ask(self, round: int, seed: int) -> None:
        """Send the model to somebody who is free, and there; if nobody is, to who comes first."""
        away = {flight[2] for flight in self.under_way}
        free = [i for i in range(len(self.asked.sizes)) if i not in away]
        there = [begins(self.clock, i, self.now) for i in free]
        first = min(there)
        free = [i for i, at in zip(free, there, strict=True) if at == first]
        self.send(free[self._drawn(len(free), seed)], round, seed)

    def _drawn(self, many: int, seed: int) -> int:
        if many == 1:  # nothing to draw
            return 0
        g = seeds.generator(seed, "next", self.sent)
        return int(torch.randint(many, (1,), generator=g))

    def land(self) -> Flight:
        """The next to arrive; the clock is then."""
        flight = heapq.heappop(self.under_way)
        self.now = flight[0]
        self.came[flight[2]] += 1
        return flight


def check_sizes(pace: str, asked: Any) -> int:
    """How many clients there are; raises ConfigError where they are elsewhere."""
    if asked.sizes is None:
        raise ConfigError(
            f"pace {pace} simulates when clients arrive, and sites arrive by themselves: leave it out"
        )
    return len(asked.sizes)
