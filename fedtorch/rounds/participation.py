"""Who takes part in a round."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from fedtorch import seeds
from fedtorch.options import COUNT, RATE, SHARE, briefly, check
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class Participation:
    """Base: draw a cohort, then lose some of it on the way."""

    def __init_subclass__(cls) -> None:
        """Show what differs from the defaults."""
        briefly(cls)

    dropout: float = 0.0
    """Chance that a chosen client never reports back (a simulated failure)."""

    def __post_init__(self) -> None:
        """Refuse what is no probability or no number of clients."""
        check(self, "participation", dropout=SHARE, cohort_size=COUNT, rate=RATE)

    def cohort(
        self,
        population: int,
        seed: int,
        round: int,
        chosen: list[int] | None = None,
        ids: Sequence[str] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Indices of the clients that report, and of those that were chosen but dropped out.

        ``chosen`` are clients that somebody else has drawn already (client-level privacy does). A coin
        belongs to a client, by its id (none: by its index), and not to a place in the cohort: one client
        more changes nobody else's.
        """
        who: Sequence[Hashable] = range(population) if ids is None else ids
        if chosen is None:
            chosen = self.choose(who, seed, round)
        if not self.dropout:
            return chosen, []
        gone = {i for i in chosen if coin(seed, "dropout", round, who[i]) < self.dropout}
        return [i for i in chosen if i not in gone], [i for i in chosen if i in gone]

    def choose(self, who: Sequence[Hashable], seed: int, round: int) -> list[int]:
        """Indices of this round's clients, ascending."""
        return list(range(len(who)))

    def most(self, population: int) -> int:
        """Clients of the largest cohort there can be."""
        return population

    def check(self, population: int) -> None:
        """Refuse a choice that this population cannot meet."""


def coin(seed: int, purpose: str, round: int, client: Hashable) -> float:
    """A uniform in [0, 1) of one client in one round."""
    return seeds.derive(seed, purpose, round, str(client)) * 2.0**-63


@dataclass(frozen=True, kw_only=True)
class Everyone(Participation):
    """All clients, every round."""


@dataclass(frozen=True, kw_only=True)
class Uniform(Participation):
    """A fixed number of clients, drawn without replacement."""

    cohort_size: int = 10
    """Clients in each round."""

    def choose(self, who: Sequence[Hashable], seed: int, round: int) -> list[int]:
        """A uniformly random subset."""
        generator = seeds.generator(seed, "cohort", round)
        return sorted(torch.randperm(len(who), generator=generator)[: self.cohort_size].tolist())

    def most(self, population: int) -> int:
        """All of them alike."""
        return self.cohort_size

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

    def choose(self, who: Sequence[Hashable], seed: int, round: int) -> list[int]:
        """One coin for each client."""
        return [i for i, c in enumerate(who) if coin(seed, "cohort", round, c) < self.rate]
