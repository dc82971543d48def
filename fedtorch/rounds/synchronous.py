"""What a round waits for: which visits a step of the server is made of. Synchronous: all it asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from fedtorch.rounds.participation import Participation
from fedtorch.types import ConfigError

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


@dataclass(frozen=True)
class Step:
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


class Asked(NamedTuple):
    """What a pace looks at to refuse what it cannot keep."""

    recipe: Any
    participation: Participation
    sizes: Sequence[int] | None
    """Examples of each client; None: its server does not know them."""
    bytes: int
    """Of one visit, down and up."""


class Rounds(Protocol):
    """When the server steps: a frozen dataclass of options."""

    timed: ClassVar[bool]
    """Who counts hangs on how long visits take."""
    overlaps: ClassVar[bool]
    """Whoever is free is asked, and visits to several models are under way together."""

    def check(self, asked: Asked) -> list[str]:
        """Raises ConfigError where it cannot be kept; notes for whoever starts the run."""

    def step(self, flights: Any, round: int, seed: int, draw: Draw, asked: Asked) -> Step:
        """The next step, from who is under way (None: nobody); it draws from the seed alone."""


@dataclass(frozen=True, kw_only=True)
class Synchronous:
    """A step takes the whole cohort, however long its slowest client needs."""

    timed: ClassVar[bool] = False
    overlaps: ClassVar[bool] = False

    def check(self, asked: Asked) -> list[str]:
        """It always can."""
        return []

    def step(self, flights: Any, round: int, seed: int, draw: Draw, asked: Asked) -> Step:
        """All that were asked and do not drop out."""
        if flights is not None:
            raise ConfigError(
                "a clock has run from before: go on with the pace that the run had (--pace)"
            )
        reporting, lost = draw()
        return Step([[*reporting, *lost]], [Due(reporting, round)], dict.fromkeys(lost, DROPPED))
