"""Client learning rate over rounds: a pure function of the round, so that resuming needs no state."""

import math
from dataclasses import dataclass

from fedtorch.optimizers import positive
from fedtorch.types import ConfigError


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
        if not 0 < self.decay <= 1:
            raise ConfigError(f"schedule.decay must be in (0, 1], got {self.decay}")

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
        positive("schedule.every", self.every)
        if not 0 < self.decay <= 1:
            raise ConfigError(f"schedule.decay must be in (0, 1], got {self.decay}")

    def __call__(self, round: int) -> float:
        """Decay ** (round // every)."""
        return self.decay ** (round // self.every)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from 1 down to ``floor`` over ``period`` rounds, then flat."""

    period: int = 100
    """Rounds until the floor is reached."""
    floor: float = 0.01
    """Lowest factor."""

    def __post_init__(self) -> None:
        """Refuse an empty period and a negative floor."""
        positive("schedule.period", self.period)
        positive("schedule.floor", self.floor)

    def __call__(self, round: int) -> float:
        """Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5 without restarts."""
        done = min(round / self.period, 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


Schedule = Constant | Exponential | Step | Cosine
