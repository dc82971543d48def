"""Rules that look at whole updates: which are near each other, and how much of each to take."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtorch.aggregation.robust import near_median
from fedtorch.aggregation.rows import Robust
from fedtorch.aggregation.table import Table, distances
from fedtorch.options import COUNT, POSITIVE, check
from fedtorch.types import ConfigError, Params

MOST_STEPS = 1000
"""Steps after which a search that has not settled ends."""


@dataclass(frozen=True, kw_only=True)
class Krum(Robust):
    """The update nearest to its neighbours (Blanchard et al. 2017, NeurIPS; arXiv:1703.02757, section 4).

    Its score is the sum of squared distances to its n - f - 2 nearest others.
    """

    f: int = 1
    """How many clients of a round may lie; 2f + 2 < n."""
    needs: ClassVar[str] = "2f + 3"

    @property
    def least(self) -> int:
        """2f + 2 < n."""
        return 2 * self.f + 3

    def shares(self, points: Tensor) -> Tensor:
        """All of the best."""
        return best(scores(points[:-1], self.f), 1)


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Robust):
    """The mean of the m updates nearest to their neighbours (Blanchard et al. 2017, arXiv:1703.02757)."""

    f: int = 1
    """How many clients of a round may lie; 2f + 2 < n."""
    m: int | None = None
    """Updates that are averaged, at most n - f; none: n - f."""
    needs: ClassVar[str] = "max(2f + 3, m + f)"
    lowers: ClassVar[str] = "aggregator.f or aggregator.m"

    def __post_init__(self) -> None:
        """Refuse what is no number of clients."""
        check(self, "aggregator", m=COUNT)
        super().__post_init__()

    @property
    def least(self) -> int:
        """2f + 2 < n and m <= n - f."""
        return max(2 * self.f + 3, (self.m or 0) + self.f)

    def shares(self, points: Tensor) -> Tensor:
        """Alike for the m best."""
        count = len(points) - 1
        return best(scores(points[:-1], self.f), self.m or count - self.f)


@dataclass(frozen=True, kw_only=True)
class Bulyan(Robust):
    """Krum n - 2f times, then near the median by coordinate (El Mhamdi et al. 2018, arXiv:1802.07927).

    What Krum takes is left out of the next choice. Of the theta that it took, each coordinate is the mean
    of the theta - 2f that are nearest to their median.
    """

    f: int = 1
    """How many clients of a round may lie; 4f + 3 <= n."""
    needs: ClassVar[str] = "4f + 3"

    @property
    def least(self) -> int:
        """4f + 3 <= n."""
        return 4 * self.f + 3

    def merge(self, table: Table) -> tuple[Params, Tensor]:
        """Who is chosen has a part in some coordinates."""
        apart = distances(table.points[:-1]).square()
        left = [*range(len(apart))]
        chosen: list[int] = []
        for _ in range(len(apart) - 2 * self.f):
            chosen.append(left.pop(int(nearest(apart[left][:, left], self.f).argmin())))
        share = torch.zeros(len(apart))
        share[chosen] = 1 / len(chosen)
        return table.each(lambda block: near_median(block[chosen], 2 * self.f)), share


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Robust):
    """The point of the least sum of distances to all updates: RFA (Pillutla et al. 2022, arXiv:1912.13445).

    Weiszfeld's smoothed steps from the mean: z <- sum_k b_k x_k / sum_k b_k, b_k = 1 / max(nu, |x_k - z|).
    """

    steps: int | None = None
    """Steps; none: until z rests."""
    nu: float = 1e-6
    """Distances below it count as it."""

    def __post_init__(self) -> None:
        """Refuse what is no number of steps."""
        check(self, "aggregator", steps=COUNT, nu=POSITIVE)
        super().__post_init__()

    def shares(self, points: Tensor) -> Tensor:
        """Of the last step."""
        rows = points[:-1]
        share = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
        for _ in range(self.steps or MOST_STEPS):
            before = share
            beta = 1 / (rows - share @ rows).norm(dim=1).clamp(min=self.nu)
            share = beta / beta.sum()
            if self.steps is None and float((share - before).abs().max()) < 1e-14:
                break
        return torch.cat([share, share.new_zeros(1)])


@dataclass(frozen=True, kw_only=True)
class CentredClip(Robust):
    """Steps from where the last round ended, each clipped (Karimireddy et al. 2021, arXiv:2012.10333).

    v <- v + mean_k (x_k - v) min(1, tau / |x_k - v|); v is kept on the server from round to round, zero at
    first.
    """

    keeps: ClassVar[bool] = True

    tau: float = 10.0
    """How far one update may draw, in parameter units."""
    steps: int = 1
    """Steps in a round."""

    def __post_init__(self) -> None:
        """Refuse what is no length."""
        check(self, "aggregator", tau=POSITIVE, steps=COUNT)
        super().__post_init__()

    def shares(self, points: Tensor) -> Tensor:
        """Of the updates and of where the round before ended."""
        rows, count = points[:-1], len(points) - 1
        share = torch.zeros(count + 1, dtype=torch.float64)
        share[-1] = 1
        for _ in range(self.steps):
            part = within(rows, share @ points, self.tau) / count
            share = share * (1 - part.sum())
            share[:-1] += part
        return share


@dataclass(frozen=True, kw_only=True)
class NormBound(Robust):
    """The mean of updates, each no longer than a bound (Sun et al. 2019, arXiv:1911.07963, section 4)."""

    bound: float = 1.0
    """Length, in parameter units, to which a longer update is shortened."""

    def __post_init__(self) -> None:
        """Refuse what is no length."""
        check(self, "aggregator", bound=POSITIVE)
        super().__post_init__()

    def shares(self, points: Tensor) -> Tensor:
        """Less of the longer ones; the reference is zero."""
        share = within(points[:-1], points[-1], self.bound) / (len(points) - 1)
        return torch.cat([share, share.new_zeros(1)])


@dataclass(frozen=True, kw_only=True)
class FLTrust(Robust):
    """Updates along that of a client who is trusted, and as long (Cao et al. 2021, arXiv:2012.13995).

    sum_k t_k (|g| / |x_k|) x_k / sum_k t_k with t_k = max(0, cos(x_k, g)). g is the update of the client
    that holds the server's own clean data; it counts no further.
    """

    trusted: str = "server"
    """Id of the client that holds the server's data; it has to be in every round."""

    def __post_init__(self) -> None:
        """Refuse mixtures, in which the trusted update would be one of many."""
        super().__post_init__()
        if self.pre is not None:
            raise ConfigError(
                "aggregator fltrust takes updates as they are: leave aggregator.pre out"
            )

    @property
    def trusts(self) -> str | None:
        """Whose update comes first."""
        return self.trusted

    @property
    def least(self) -> int:
        """The trusted one and another."""
        return 2

    def shares(self, points: Tensor) -> Tensor:
        """By the angle to the first, seen from the reference, which is zero."""
        vectors = points[:-1] - points[-1]
        length = vectors.norm(dim=1).clamp(min=1e-300)
        trust = (vectors @ vectors[0] / length / length[0]).clamp(min=0)
        trust[0] = 0
        share = trust * length[0] / length / trust.sum().clamp(min=1e-300)
        return torch.cat([share, share.new_zeros(1)])


def scores(points: Tensor, f: int) -> Tensor:
    """Krum's: of each of n, the sum of squared distances to its n - f - 2 nearest others, [n]."""
    return nearest(distances(points).square(), f)


def nearest(apart: Tensor, f: int) -> Tensor:
    """The same from squared distances, [n, n]; its diagonal is overwritten."""
    apart.fill_diagonal_(torch.inf)
    return apart.sort(1).values[:, : max(1, len(apart) - f - 2)].sum(1)


def best(scores: Tensor, count: int) -> Tensor:
    """Equal shares of those with the ``count`` lowest scores [n], and none of the reference, [n + 1]."""
    share = torch.zeros(len(scores) + 1, dtype=torch.float64)
    share[scores.argsort(stable=True)[:count]] = 1 / count
    return share


def within(rows: Tensor, centre: Tensor, most: float) -> Tensor:
    """What each row's difference to the centre is multiplied by, to be no longer than ``most``, [n]."""
    away: Tensor = (rows - centre).norm(dim=1)
    return (most / away.clamp(min=1e-300)).clamp(max=1)
