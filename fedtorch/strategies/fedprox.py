"""FedProx: a proximal term keeps local training near the global model."""

import math
from dataclasses import dataclass

from fedtorch.strategies.base import Strategy
from fedtorch.tree import tmap
from fedtorch.types import ConfigError, Context, Stack


@dataclass(frozen=True, kw_only=True)
class FedProx(Strategy):
    """Adds mu/2 ||w - w_t||^2 to each local loss (Li et al. 2020, arXiv:1812.06127, eq. 2)."""

    mu: float = 0.01
    """Proximal weight; 0 is FedAvg."""

    def __post_init__(self) -> None:
        """Refuse a negative or NaN weight."""
        super().__post_init__()
        if not 0 <= self.mu < math.inf:
            raise ConfigError(f"strategy.mu must be a number >= 0, got {self.mu}")

    def correct(self, grads: Stack, params: Stack, ctx: Context) -> Stack:
        """The gradient of the proximal term, mu (w - w_t), on top of the loss's."""
        return tmap(lambda g, w, w0: g.add(w - w0, alpha=self.mu), grads, params, ctx.anchor)
