"""What a round waits for: which visits a step of the server is made of. Synchronous: all it asked."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from fedtorch.channel import base as channel
from fedtorch.options import Range, check
from fedtorch.rounds.clock import Clock
from fedtorch.rounds.participation import Participation
from fedtorch.rounds.sky import Sky, check_sizes
from fedtorch.tree import nbytes
from fedtorch.types import ConfigError, Params

DROPPED = "dropped", "it dropped out"

Draw = Callable[[], tuple[list[int], list[int]]]
"""Draws a cohort: who reports, and who was chosen and drops out."""


@dataclass(frozen=True)
class Due:
    """Visits to the server's model of one round that a step is made of; no client is in them twice."""

    who: list[int]
    version: int
    """Round in which they were sent the model."""
    visit: int = 0
    """How many visits to that model these clients have made before."""
    factor: float = 1.0
    """What their changes are multiplied by, at most 1."""
    mixes: bool = False
    """The change is from the server's model as it is now to theirs, not from what they were sent."""


@dataclass(frozen=True)
class ServerStep:
    """One step of the server: whom it asks, and whose work it takes."""

    asked: list[list[int]]
    """Who is sent the model as it is now: once each, and in further lists those that are asked again."""
    due: list[Due]
    lost: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Who was asked and will not report, and why: the kind of failure, and words."""
    flights: Any = None
    """Who is under way after it, as plain values."""
    versions: frozenset[int] = frozenset()
    """Rounds whose model somebody under way has."""
    figures: dict[str, float] = field(default_factory=dict)


class Demands(NamedTuple):
    """What a pace looks at to refuse what it cannot keep."""

    recipe: Any
    participation: Participation
    sizes: Sequence[int] | None
    """Examples of each client; None: its server does not know them."""
    bytes: int
    """Of one visit, down and up."""

    @classmethod
    def of(
        cls,
        recipe: Any,
        participation: Participation,
        sizes: Sequence[int] | None,
        weights: Params,
        coded: Mapping[str, Params],
    ) -> "Demands":
        """``coded``: names and shapes of what a channel encodes, by group."""
        down = nbytes(weights.values())
        up = channel.bytes_of(recipe.channel, coded) if coded else down
        return cls(recipe, participation, sizes, down + up)


class Rounds(Protocol):
    """When the server steps: a frozen dataclass of options.

    One whose steps take fewer than were asked has ``counted(asked)``, how many: see ``counted`` below.
    """

    timed: ClassVar[bool]
    """Who counts hangs on how long visits take."""
    overlaps: ClassVar[bool]
    """Whoever is free is asked, and visits to several models are under way together."""

    def check(self, asked: Demands) -> list[str]:
        """Raises ConfigError where it cannot be kept; notes for whoever starts the run."""

    def step(self, flights: Any, round: int, seed: int, draw: Draw, asked: Demands) -> ServerStep:
        """The next step, from who is under way (None: nobody); it draws from the seed alone."""


@dataclass(frozen=True, kw_only=True)
class Synchronous:
    """A step takes the whole cohort, and as long as its slowest client (arXiv:1602.05629)."""

    timed: ClassVar[bool] = False
    overlaps: ClassVar[bool] = False

    clock: Clock | None = None
    """How long visits would take, on the same time axis as other paces; none: no time is simulated."""

    def check(self, asked: Demands) -> list[str]:
        """It always can; only a clock has to know the clients."""
        if self.clock is not None:
            check_sizes("synchronous with a clock", asked)
        return []

    def step(self, flights: Any, round: int, seed: int, draw: Draw, asked: Demands) -> ServerStep:
        """All that were asked and do not drop out."""
        if self.clock is None:
            if flights is not None:
                raise ConfigError(
                    "a clock has run from before: go on with the pace that the run had (--pace)"
                )
            reporting, lost = draw()
            return ServerStep(
                [[*reporting, *lost]], [Due(reporting, round)], dict.fromkeys(lost, DROPPED)
            )
        return waited(self, self.clock, flights, round, seed, draw, asked)


@dataclass(frozen=True, kw_only=True)
class OverSelected:
    """More clients are asked than are needed, and a step takes the first to arrive (arXiv:1902.01046).

    Of a cohort of 13 (``participation.cohort_size``) and ``over`` 1.3 the first 10 count. The work of the
    others is lost, as is what they would have remembered.
    """

    timed: ClassVar[bool] = True
    overlaps: ClassVar[bool] = False

    over: float = 1.3
    """How many times as many are asked as count."""
    clock: Clock = Clock()
    """How long visits take."""

    def __post_init__(self) -> None:
        """Refuse to ask fewer."""
        check(self, "pace", over=Range("a number >= 1", 1, math.inf, "high"))

    def check(self, asked: Demands) -> list[str]:
        """Raises ConfigError where clients are elsewhere, or nobody would be left out; a note on costs."""
        check_sizes("over-selected", asked)
        most = asked.participation.most(len(asked.sizes or ()))
        if self.counted(most) == most:
            raise ConfigError(
                f"pace over-selected with pace.over {self.over:g} leaves none of {most} clients out: raise "
                "pace.over, or participation.cohort_size"
            )
        notes = [f"pace over-selected: of {most} clients that are asked {self.counted(most)} count"]
        if asked.recipe.privacy.claims:
            notes += ["pace over-selected: who is asked is charged, whether it counts or not"]
        return notes

    def step(self, flights: Any, round: int, seed: int, draw: Draw, asked: Demands) -> ServerStep:
        """The first to arrive of those that were asked and do not drop out."""
        return waited(self, self.clock, flights, round, seed, draw, asked)

    def counted(self, asked: int) -> int:
        """How many of those asked count, to the nearest, at least one."""
        return max(1, round(asked / self.over))


def counted(pace: Rounds, asked: int) -> int:
    """How many of so many that are asked a step takes: all, where the pace says nothing of it."""
    return int(pace.counted(asked)) if hasattr(pace, "counted") else asked


def waited(
    pace: Rounds, clock: Clock, flights: Any, round: int, seed: int, draw: Draw, asked: Demands
) -> ServerStep:
    """The step of the first of a cohort to arrive; the clock is at the last of them then."""
    if flights is None and round > 0:
        raise ConfigError("no clock has run so far: go on with the pace that the run had (--pace)")
    sky = Sky(clock, asked, **(flights or {}))
    if sky.under_way:
        raise ConfigError("clients are under way: go on with the pace that the run had (--pace)")
    reporting, gone = draw()
    for client in reporting:
        sky.send(client, round, seed)
    wanted = min(counted(pace, len(reporting) + len(gone)), len(reporting))
    first = sorted(sky.land()[2] for _ in range(wanted))
    late = ("late", f"{wanted} others had arrived")
    lost = {i: late for i in reporting if i not in first} | dict.fromkeys(gone, DROPPED)
    sky.under_way = []
    cohort = [[*reporting, *gone]]
    return ServerStep(cohort, [Due(first, round)], lost, sky.kept(), frozenset(), sky.figures())
