"""Who takes part in a round."""

from dataclasses import dataclass

import torch

from fedtorch import seeds
from fedtorch.options import COUNT, RATE, SHARE, check
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class Participation:
    """Base: draw a cohort, then lose some of it on the way."""

    dropout: float = 0.0
    """Chance that a chosen client never reports back (a simulated failure)."""

    def __post_init__(self) -> None:
        """Refuse what is no probability or no number of clients."""
        check(self, "participation", dropout=SHARE, cohort_size=COUNT, rate=RATE)

    def cohort(
        self, population: int, seed: int, round: int, chosen: list[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Indices of the clients that report, and of those that were chosen but dropped out.

        ``chosen`` are clients that somebody else has drawn already (client-level privacy does).
        """
        if chosen is None:
            chosen = self.choose(population, seeds.generator(seed, "cohort", round))
        if not self.dropout:
            return chosen, []
        lost = torch.rand(len(chosen), generator=seeds.generator(seed, "dropout", round))
        late = (lost < self.dropout).tolist()
        return (
            [i for i, gone in zip(chosen, late, strict=True) if not gone],
            [i for i, gone in zip(chosen, late, strict=True) if gone],
        )

    def choose(self, population: int, generator: torch.Generator) -> list[int]:
        """Indices of this round's clients, ascending."""
        return list(range(population))

    def check(self, population: int) -> None:
        """Refuse a choice that this population cannot meet."""


@dataclass(frozen=True, kw_only=True)
class Everyone(Participation):
    """All clients, every round."""


@dataclass(frozen=True, kw_only=True)
class Uniform(Participation):
    """A fixed number of clients, drawn without replacement."""

    cohort_size: int = 10
    """Clients in each round."""

    def choose(self, population: int, generator: torch.Generator) -> list[int]:
        """A uniformly random subset."""
        picked = torch.randperm(population, generator=generator)[: self.cohort_size]
        return sorted(picked.tolist())

    def check(self, population: int) -> None:
        """The cohort must fit into the population."""
        if not 1 <= self.cohort_size <= population:
            raise ConfigError(
                f"participation.cohort_size must be between 1 and the {population} clients, "
                f"got {self.cohort_size}"
            )


@dataclass(frozen=True, kw_only=True)
class Poisson(Participation):
    """Each client independently with a given rate; a round may be empty."""

    rate: float = 0.1
    """Chance of each client to be chosen in a round."""

    def choose(self, population: int, generator: torch.Generator) -> list[int]:
        """One coin for each client."""
        coins = torch.rand(population, generator=generator) < self.rate
        return coins.nonzero().flatten().tolist()
