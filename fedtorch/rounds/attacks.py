"""Attacks to try rules against: what liars train on, and what they send in place of what they learned."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedtorch import seeds
from fedtorch.rounds.threat import Threat
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class SignFlip(Threat):
    """The opposite of what was learned, ``scale`` times (Li et al. 2019, arXiv:1811.03761)."""

    scale: float = 1.0
    """How many times as long."""

    def rows(self, honest: Tensor, own: Tensor, seed: int) -> Tensor:
        """-x."""
        return -self.scale * own


@dataclass(frozen=True, kw_only=True)
class Gauss(Threat):
    """Noise in place of an update (Blanchard et al. 2017, arXiv:1703.02757)."""

    std: float = 1.0
    """Standard deviation of each number."""

    def rows(self, honest: Tensor, own: Tensor, seed: int) -> Tensor:
        """Other noise each round and liar."""
        draw = seeds.generator(seed, "gauss")
        return self.std * torch.randn(own.shape, dtype=torch.float64, generator=draw)


@dataclass(frozen=True, kw_only=True)
class LabelFlip(Threat):
    """Honest training on labels y -> C - 1 - y (Fang et al. 2020, arXiv:1911.11815)."""

    classes: int | None = None
    """C; none: as many as clients' labels say."""

    def fitted(self, data: Sequence[Dataset]) -> "Threat":
        """With the number of classes that all clients have together."""
        if self.classes is not None:
            return self
        return replace(self, classes=1 + max(int(self._labels(d)[1].max()) for d in data))

    def data(self, data: Dataset) -> Dataset:
        """With other labels; raises ConfigError where there are none."""
        x, y = self._labels(data)
        classes = self.classes or int(y.max()) + 1
        if int(y.max()) >= classes:
            raise ConfigError(
                f"threat.classes {classes} is too few for label {int(y.max())}: say how many there are"
            )
        return TensorDataset(*x, classes - 1 - y)

    def _labels(self, data: Dataset) -> tuple[list[Tensor], Tensor]:
        if type(data) is not TensorDataset or data.tensors[-1].is_floating_point():
            raise ConfigError("threat label-flip is for data (x, y) with whole numbers as labels")
        *x, y = data.tensors
        return x, y


@dataclass(frozen=True, kw_only=True)
class Alie(Threat):
    """A little is enough: mean - z deviations of the honest ones (Baruch et al. 2019, arXiv:1902.06156)."""

    z: float | None = None
    """none: as far as the paper's count of clients lets liars go unseen."""

    def rows(self, honest: Tensor, own: Tensor, seed: int) -> Tensor:
        """Coordinate by coordinate."""
        z = furthest(len(honest) + len(own), len(own)) if self.z is None else self.z
        return (honest.mean(0) - z * deviation(honest)).expand(own.shape)

    def idle(self, clients: int) -> str:
        """Where the paper's z is 0."""
        if self.z is not None or furthest(clients, self.liars):
            return ""
        return (
            f"the paper's z is 0 for {self.liars} of {clients}, and who lies sends the honest mean: "
            "take more threat.liars, or give threat.z"
        )


@dataclass(frozen=True, kw_only=True)
class Ipm(Threat):
    """Inner product manipulation: -epsilon times the honest mean (Xie et al. 2020, arXiv:1903.03936)."""

    epsilon: float = 0.5
    """How many times as long as the mean."""

    def rows(self, honest: Tensor, own: Tensor, seed: int) -> Tensor:
        """All alike."""
        return (-self.epsilon * honest.mean(0)).expand(own.shape)


@dataclass(frozen=True, kw_only=True)
class MinMax(Threat):
    """As far against the deviation as no farther from anybody than two honest ones are (NDSS 2021)."""

    sums: ClassVar[bool] = False

    def rows(self, honest: Tensor, own: Tensor, seed: int) -> Tensor:
        """Mean - gamma deviations with the largest gamma, by bisection."""
        mean, way = honest.mean(0), -deviation(honest)
        apart = torch.cdist(honest, honest, compute_mode="donot_use_mm_for_euclid_dist").square()
        allowed = apart.sum(1).max() if self.sums else apart.max()

        def fits(gamma: float) -> bool:
            away = (mean + gamma * way - honest).square().sum(1)
            return bool((away.sum() if self.sums else away.max()) <= allowed)

        low, high = 0.0, 1.0
        while fits(high) and high < 1e9:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return (mean + low * way).expand(own.shape)


@dataclass(frozen=True, kw_only=True)
class MinSum(MinMax):
    """Min-max by the sum of squared distances to all in place of the largest (NDSS 2021)."""

    sums: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Mimic(Threat):
    """All liars send what one honest client sends, who so counts for many (arXiv:2006.09365, section 3)."""

    def rows(self, honest: Tensor, own: Tensor, seed: int) -> Tensor:
        """The same client's in every round in which it is there: the first by id."""
        return honest[0].expand(own.shape)


def deviation(rows: Tensor) -> Tensor:
    """Of a sample [n, d], by coordinate, [d]; zeros of a single row."""
    return rows.std(0) if len(rows) > 1 else torch.zeros_like(rows[0])


def furthest(clients: int, liars: int) -> float:
    """ALIE's z: how far off a value is that enough honest ones are beyond; 0: no attack is that small."""
    needed = clients // 2 + 1 - liars
    share = (clients - liars - needed) / (clients - liars)
    return statistics.NormalDist().inv_cdf(share) if 0.5 < share < 1 else 0.0
