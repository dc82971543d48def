"""Banded matrix-factorisation noise: better than independent noise where no sampling can be claimed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedtorch.options import COUNT, check
from fedtorch.types import Params


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Noise of a round takes back part of the noise of the rounds before (Choquette-Choo et al. 2023,
    arXiv:2306.08153, banded Toeplitz; coefficients of arXiv:2202.11205, truncated and normalised).

    Clients are split into ``count`` fixed groups that take turns, so that a client is in every
    ``count``-th round at most: this minimum separation is what keeps its sensitivity at the square root
    of its number of rounds, and it is enforced by drawing cohorts from the group whose turn it is.
    """

    count: int = 4
    """Bands, groups, and rounds between two turns of a client; 1 is independent noise."""

    def __post_init__(self) -> None:
        """Refuse no bands at all."""
        check(self, "privacy.bands", count=COUNT)

    def group(self, population: int, round: int) -> range:
        """Clients whose turn it is."""
        return range(round % self.count, population, self.count)

    def coefficients(self) -> list[float]:
        """First column of the strategy matrix, of norm 1: c_k = c_(k-1) (2k - 1) / 2k."""
        c = [1.0]
        for k in range(1, self.count):
            c.append(c[-1] * (2 * k - 1) / (2 * k))
        norm = math.sqrt(sum(x * x for x in c))
        return [x / norm for x in c]

    def correlate(
        self, fresh: dict[str, Params], past: Sequence[dict[str, Params]]
    ) -> dict[str, Params]:
        """n_t = (xi_t - sum_i c_i n_(t-i)) / c_0; ``past`` has the newest first."""
        first, *rest = self.coefficients()
        return {
            g: {
                k: (xi - sum(c * old[g][k] for c, old in zip(rest, past, strict=False))) / first
                for k, xi in p.items()
            }
            for g, p in fresh.items()
        }
