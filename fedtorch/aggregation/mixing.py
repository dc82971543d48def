"""What is done to updates before a robust rule, where clients' data differ: each row becomes a mixture."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtorch import seeds
from fedtorch.aggregation.table import Table, distances
from fedtorch.options import Range, check
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class Mixing(ABC):
    """Rows in, rows out: some mixture of clients in the place of each."""

    @abstractmethod
    def matrix(self, table: Table, f: int, seed: int) -> Tensor:
        """Of which clients each new row is made, [rows, clients]; ``f`` of the clients may lie."""

    def fits(self, f: int) -> None:  # noqa: B027 (most fit always)
        """Raises ConfigError where it would do nothing for so many liars."""

    def suits(self, clients: int) -> None:  # noqa: B027 (most suit always)
        """Raises ConfigError where it would leave one row of so many clients, which no rule can judge."""

    def needed(self, rows: int) -> int:
        """Clients of whom it makes so many rows."""
        return rows


@dataclass(frozen=True, kw_only=True)
class NNM(Mixing):
    """Nearest-neighbour mixing (Allouah et al. 2023, arXiv:2302.01772, Alg. 2).

    Each update becomes the mean of its n - f nearest, itself among them.
    """

    def matrix(self, table: Table, f: int, seed: int) -> Tensor:
        """By the distances of whole vectors."""
        count = len(table)
        apart = distances(table.points[:-1]).fill_diagonal_(-1)  # itself first, twins or not
        nearest = apart.sort(dim=1, stable=True).indices[:, : count - f]
        return torch.zeros(count, count).double().scatter_(1, nearest, 1 / (count - f))

    def fits(self, f: int) -> None:
        """Without liars it would make every update the mean."""
        if not f:
            raise ConfigError(
                "aggregator.pre nnm needs aggregator.f, how many clients may lie: with f 0 every update "
                "would become the mean of all"
            )


@dataclass(frozen=True, kw_only=True)
class Bucketing(Mixing):
    """Means of ``size`` clients each, shuffled every round (Karimireddy et al. 2022, arXiv:2006.09365).

    As many buckets may be spoilt as clients lie, so the rule after it needs its number of buckets.
    """

    size: int = 2
    """Clients in a bucket; the last may have fewer."""

    def __post_init__(self) -> None:
        """Refuse buckets that mix nothing."""
        check(self, "aggregator.pre", size=Range("at least 2", 2, float("inf"), "high"))

    def suits(self, clients: int) -> None:
        """Two buckets at least."""
        if clients <= self.size:
            raise ConfigError(
                f"aggregator.pre.size {self.size} makes one bucket, the mean of all, as a round has "
                f"{clients} clients: take fewer"
            )

    def matrix(self, table: Table, f: int, seed: int) -> Tensor:
        """By a shuffle of the round's own."""
        draw = seeds.generator(seed, "buckets")
        return buckets(torch.randperm(len(table), generator=draw), self.size)

    def needed(self, rows: int) -> int:
        """Enough for so many buckets."""
        return self.size * (rows - 1) + 1


def buckets(order: Tensor, size: int) -> Tensor:
    """The mean of each ``size`` of the clients in this order, [buckets, clients]."""
    parts = order.split(size)
    found = torch.zeros(len(parts), len(order), dtype=torch.float64)
    for row, members in zip(found, parts, strict=True):
        row[members] = 1 / len(members)
    return found
