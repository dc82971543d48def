"""FedProx: a proximal term keeps local training near the global model."""

from dataclasses import dataclass
from typing import ClassVar

from fedtorch.options import NOT_NEGATIVE, check
from fedtorch.strategies.base import Correction, Strategy
from fedtorch.types import Context


@dataclass(frozen=True, kw_only=True)
class FedProx(Strategy):
    """Adds mu/2 ||w - w_t||^2 to each local loss (Li et al. 2020, arXiv:1812.06127, eq. 2)."""

    draws_by: ClassVar[str] = "mu"

    mu: float = 0.01
    """Proximal weight; 0 is FedAvg."""

    def __post_init__(self) -> None:
        """Refuse a negative or NaN weight."""
        check(self, "strategy", mu=NOT_NEGATIVE)

    def correction(self, ctx: Context) -> Correction:
        """The gradient of the proximal term, mu (w - w_t), on top of the loss's."""
        return Correction(pull=self.mu)
