"""A simulated clock: how long a visit takes is drawn and never measured, so that a run repeats."""

import math
from dataclasses import dataclass

import torch

from fedtorch import seeds
from fedtorch.options import NOT_NEGATIVE, check


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds of a visit: those of its start, examples and bytes, times the client's speed and a draw."""

    start: float = 0.0
    """Seconds that a visit takes whatever it does."""
    example: float = 1.0
    """Seconds for an example, every pass counted."""
    megabyte: float = 0.0
    """Seconds for a megabyte, up or down."""
    spread: float = 0.0
    """Standard deviation of the logarithm of clients' speeds, which stay for the run; 0: all alike."""
    jitter: float = 0.0
    """Each visit takes 1 + |N(0, jitter)| times as long, as in FedBuff's experiments (arXiv:2106.06639)."""

    def __post_init__(self) -> None:
        """Refuse time that runs backwards."""
        check(
            self,
            "pace.clock",
            **dict.fromkeys(("start", "example", "megabyte", "spread", "jitter"), NOT_NEGATIVE),
        )

    def seconds(self, client: int, visit: int, examples: int, bytes: int, seed: int) -> float:
        """How long the visit of this number takes."""
        plain = self.start + examples * self.example + bytes / 1e6 * self.megabyte
        own = math.exp(self.spread * _normal(seed, "speed", client))
        return plain * own * (1 + abs(self.jitter * _normal(seed, "seconds", visit)))


def _normal(seed: int, *purpose: str | int) -> float:
    return float(torch.randn((), generator=seeds.generator(seed, *purpose), dtype=torch.float64))
