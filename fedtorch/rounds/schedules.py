"""Client learning rate over rounds: a pure function of the round, so that resuming needs no state."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedtorch.options import COUNT, FRACTION, RATE, check


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same learning rate in every round."""

    def __call__(self, round: int) -> float:
        """Factor on the learning rate, 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Multiply the learning rate by ``decay`` every round."""

    decay: float = 0.99
    """Factor from one round to the next, in (0, 1]."""

    def __post_init__(self) -> None:
        """Refuse growth and zero."""
        check(self, "schedule", decay=RATE)

    def __call__(self, round: int) -> float:
        """Decay ** round."""
        return self.decay**round


@dataclass(frozen=True, kw_only=True)
class Step:
    """Multiply the learning rate by ``decay`` every ``every`` rounds."""

    every: int = 10
    """Rounds between two drops."""
    decay: float = 0.1
    """Factor at each drop."""

    def __post_init__(self) -> None:
        """Refuse what never steps or grows."""
        check(self, "schedule", every=COUNT, decay=RATE)

    def __call__(self, round: int) -> float:
        """Decay ** (round // every)."""
        return self.decay ** (round // self.every)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from 1 down to ``floor`` over ``period`` rounds, then flat."""

    period: int = 100
    """Rounds until the floor is reached."""
    floor: float = 0.01
    """Lowest factor; with 0 nothing is learnt after ``period`` rounds."""

    def __post_init__(self) -> None:
        """Refuse an empty period, and a floor that is none."""
        check(self, "schedule", period=COUNT, floor=FRACTION)

    def __call__(self, round: int) -> float:
        """Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5 without restarts."""
        done = min(round / self.period, 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


Schedule = Callable[[int], float]
"""Round -> factor on the learning rate: one of these, or a function of yours."""
