"""Rounds that wait for nobody: FedBuff on a simulated clock.

How long a visit takes does not depend on what it learns: who arrives next is known before anybody trains,
and all that were sent the same model train in one call.
"""

import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fedtorch import seeds
from fedtorch.options import COUNT, NOT_NEGATIVE, check
from fedtorch.rounds.clock import Clock
from fedtorch.rounds.synchronous import Asked, Draw, Due, Step
from fedtorch.types import ConfigError

Flight = tuple[float, int, int, int, int]
"""(arrival in seconds, number of the visit, client, round of its model, visits to that model before)."""


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """``concurrency`` clients are always under way, and the server steps on the next ``size`` to arrive.

    FedBuff (Nguyen et al. 2022, arXiv:2106.06639, Alg. 1): w <- w + (1/size) sum_i s(tau_i) delta_i with
    s(tau) = (1 + tau)^-staleness, tau being the server's steps since client i was sent the model. Clients
    count alike unless ``strategy.weighting`` is ``examples``.
    """

    timed: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True

    size: int = 10
    """Visits that a step is made of (the paper's K)."""
    concurrency: int | None = None
    """Clients under way at any time (the paper's M_c); none: 20, or all where there are fewer."""
    staleness: float = 0.5
    """Power by which older work counts less; 0: all alike."""
    clock: Clock = Clock()
    """How long visits take."""

    def __post_init__(self) -> None:
        """Refuse what is no number of clients."""
        check(self, "pace", size=COUNT, concurrency=COUNT, staleness=NOT_NEGATIVE)

    def check(self, asked: Asked) -> list[str]:
        """Raises ConfigError where there are too few clients; notes on weights and privacy."""
        recipe, sizes = asked.recipe, asked.sizes
        if sizes is None:
            raise ConfigError(
                "pace buffered simulates when clients arrive, and sites arrive by themselves: leave it out"
            )
        if (self.concurrency or 0) > len(sizes):
            raise ConfigError(
                f"pace.concurrency {self.concurrency} is more than the {len(sizes)} clients there are: "
                f"use {len(sizes)} or fewer"
            )
        alike = "alike, as in FedBuff (or --strategy.weighting examples)"
        notes = [
            f"pace buffered: {self.at_once(len(sizes))} clients are under way at any time, and count "
            f"{'by their examples' if recipe.weighting == 'examples' else alike}"
        ]
        if not recipe.privacy.claims:
            return notes
        end = "more may be spent than was planned for so many rounds"
        if recipe.privacy.target is not None:
            end = "the run ends when one of them has spent its epsilon"
        return [
            *notes,
            "pace buffered: a fast client may visit more often than there are rounds, and each visit is "
            f"charged as it begins: {end}",
        ]

    def at_once(self, clients: int) -> int:
        """How many of so many clients are under way."""
        return min(20, clients) if self.concurrency is None else self.concurrency

    def step(self, flights: Any, round: int, seed: int, draw: Draw, asked: Asked) -> Step:
        """Let the clock run until the buffer is full."""
        sky = Sky(self, **(flights or {}))
        arrived = []
        for _ in range(self.size):
            while len(sky.under_way) < self.at_once(len(asked.sizes or ())):
                sky.ask(round, seed, asked)
            arrived.append(sky.land())
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for _, _, client, version, visit in arrived:
            groups[version, visit].append(client)
        ages = [round - version for _, _, _, version, _ in arrived]
        due = [
            Due(sorted(who), version, visit, (1 + round - version) ** -self.staleness)
            for (version, visit), who in sorted(groups.items())
        ]
        figures = {
            "simulated_seconds": sky.now,
            "staleness_mean": sum(ages) / len(ages),
            "staleness_max": float(max(ages)),
        }
        kept = {"now": sky.now, "sent": sky.sent, "under_way": sorted(sky.under_way)}
        versions = frozenset(flight[3] for flight in sky.under_way)
        return Step([*sky.asked.values()], due, {}, kept, versions, figures)


@dataclass
class Sky:
    """Who is under way as the clock runs."""

    pace: Buffered
    now: float = 0.0
    sent: int = 0
    """Visits begun so far: each has a number of its own."""
    under_way: list[Flight] = field(default_factory=list)
    asked: dict[int, list[int]] = field(default_factory=dict)
    """Clients that were sent this round's model, by how often before."""
    times: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """A heap, and a copy: a round that fails is tried again from where it began."""
        self.under_way = sorted(self.under_way)

    def ask(self, round: int, seed: int, asked: Asked) -> None:
        """Send the model to somebody who is free."""
        assert asked.sizes is not None
        away = {flight[2] for flight in self.under_way}
        free = [i for i in range(len(asked.sizes)) if i not in away]
        g = seeds.generator(seed, "next", self.sent)
        client = free[int(torch.randint(len(free), (1,), generator=g))]
        work, moved = work_of(asked.recipe, asked.sizes[client]), asked.bytes
        took = self.pace.clock.seconds(client, self.sent, work, moved, seed)
        visit = self.times[client]
        heapq.heappush(self.under_way, (self.now + took, self.sent, client, round, visit))
        self.asked.setdefault(visit, []).append(client)
        self.times[client] += 1
        self.sent += 1

    def land(self) -> Flight:
        """The next to arrive; the clock is then."""
        flight = heapq.heappop(self.under_way)
        self.now = flight[0]
        return flight


def work_of(recipe: Any, examples: int) -> int:
    """Examples that a visit takes, every pass counted; under Poisson sampling, those that are expected."""
    plan = recipe.privacy.per_example
    if plan is not None:
        return int(plan.steps * plan.batch_size)
    if recipe.steps is not None:
        taken = (recipe.batch_size or examples) * recipe.accumulate
        return int(recipe.steps * min(taken, examples))
    return int(recipe.epochs * examples)
