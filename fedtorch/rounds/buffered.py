"""Rounds that wait for nobody, on a simulated clock: FedBuff and FedAsync.

How long a visit takes does not depend on what it learns: who arrives next is known before anybody trains,
and all that were sent the same model train in one call.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fedtorch.options import COUNT, NOT_NEGATIVE, POSITIVE, RATE, check, typed
from fedtorch.rounds.clock import Clock
from fedtorch.rounds.sky import Flight, Sky, check_sizes
from fedtorch.rounds.synchronous import Demands, Draw, Due, ServerStep
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """The server steps on the next ``size`` to arrive (FedBuff, Nguyen et al. 2022, arXiv:2106.06639).

    ``concurrency`` clients are always under way. Alg. 1: w <- w + (1/size) sum_i s(tau_i) delta_i with
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

    def check(self, asked: Demands) -> list[str]:
        """Raises ConfigError where there are too few clients; notes on weights and privacy."""
        alike = "alike, as in FedBuff (or --strategy.weighting examples)"
        sized = asked.recipe.weighting == "examples"
        return overlapping(self, asked, f"count {'by their examples' if sized else alike}")

    def step(self, flights: Any, round: int, seed: int, draw: Draw, asked: Demands) -> ServerStep:
        """Let the clock run until the buffer is full."""
        sky = Sky(self.clock, asked, **(flights or {}))
        arrived = []
        for _ in range(self.size):
            fill(sky, self.concurrency, round, seed)
            arrived.append(sky.land())
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for _, _, client, version, visit in arrived:
            groups[version, visit].append(client)
        due = [
            Due(sorted(who), version, visit, (1 + round - version) ** -self.staleness)
            for (version, visit), who in sorted(groups.items())
        ]
        return taken(sky, arrived, due, round)


@dataclass(frozen=True, kw_only=True)
class Asynchronous:
    """The server steps on every client that arrives, and mixes its model in (FedAsync, arXiv:1903.03934).

    Alg. 1: w <- (1 - a) w + a w_k with a = ``mixing`` x s(tau), tau being the server's steps since client k
    was sent the model. s by ``staleness``: constant 1; polynomial (tau + 1)^-power; hinge 1 up to ``grace``
    and 1 / (power (tau - grace) + 1) beyond.
    """

    timed: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True

    mixing: float = 0.6
    """How much of the new model is that of a client who is not late (the paper's alpha)."""
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial"
    """How older work counts less."""
    power: float = 0.5
    """The paper's a."""
    grace: int = 4
    """Steps that a hinge forgives (the paper's b)."""
    concurrency: int | None = None
    """Clients under way at any time; none: 20, or all where there are fewer."""
    clock: Clock = Clock()
    """How long visits take."""

    def __post_init__(self) -> None:
        """Refuse what mixes nothing."""
        check(
            self, "pace", mixing=RATE, power=POSITIVE, grace=NOT_NEGATIVE, concurrency=COUNT
        )  # fmt: skip

    def check(self, asked: Demands) -> list[str]:
        """Raises ConfigError where there are too few clients; notes on weights and privacy."""
        return overlapping(self, asked, "each makes a step of its own")

    def step(self, flights: Any, round: int, seed: int, draw: Draw, asked: Demands) -> ServerStep:
        """Let the clock run until somebody arrives."""
        sky = Sky(self.clock, asked, **(flights or {}))
        fill(sky, self.concurrency, round, seed)
        flight = sky.land()
        _, _, client, version, visit = flight
        share = self.mixing * self._kept(round - version)
        return taken(sky, [flight], [Due([client], version, visit, share, mixes=True)], round)

    def _kept(self, late: int) -> float:
        if self.staleness == "polynomial":
            return float((late + 1) ** -self.power)
        if self.staleness == "hinge" and late > self.grace:
            return 1 / (self.power * (late - self.grace) + 1)
        return 1.0


def at_once(concurrency: int | None, clients: int) -> int:
    """How many of so many clients are under way."""
    return min(20, clients) if concurrency is None else concurrency


def fill(sky: Sky, concurrency: int | None, round: int, seed: int) -> None:
    """Ask until enough are under way."""
    while len(sky.under_way) < at_once(concurrency, len(sky.asked.sizes or ())):
        sky.ask(round, seed)


def taken(sky: Sky, arrived: list[Flight], due: list[Due], round: int) -> ServerStep:
    """The step of what has arrived."""
    ages = [round - version for _, _, _, version, _ in arrived]
    old = {"staleness_mean": sum(ages) / len(ages), "staleness_max": float(max(ages))}
    versions = frozenset(flight[3] for flight in sky.under_way)
    return ServerStep([*sky.fresh.values()], due, {}, sky.kept(), versions, sky.figures() | old)


def overlapping(pace: Buffered | Asynchronous, asked: Demands, counts: str) -> list[str]:
    """Notes on how clients count and what privacy costs; raises ConfigError where there are too few."""
    name = typed(pace)
    clients = check_sizes(name, asked)
    if (pace.concurrency or 0) > clients:
        raise ConfigError(
            f"pace.concurrency {pace.concurrency} is more than the {clients} clients there are: use "
            f"{clients} or fewer"
        )
    busy = at_once(pace.concurrency, clients)
    notes = [f"pace {name}: {busy} clients are under way at any time, and {counts}"]
    if not asked.recipe.privacy.claims:
        return notes
    end = "more may be spent than was planned for so many rounds"
    if asked.recipe.privacy.target is not None:
        end = "the run ends when one of them has spent its epsilon"
    return [
        *notes,
        f"pace {name}: a fast client may visit more often than there are rounds, and each visit is charged "
        f"as it begins: {end}",
    ]
