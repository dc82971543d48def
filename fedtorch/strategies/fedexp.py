"""FedExP: the server steps the further, the more clients' changes cancel."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtorch.options import NOT_NEGATIVE, check
from fedtorch.strategies.base import Strategy
from fedtorch.strategies.needs import no_optimizer
from fedtorch.types import Context, Params


@dataclass(frozen=True, kw_only=True)
class FedExP(Strategy):
    """Server rate max(1, mean |delta_k|^2 / 2(|mean delta|^2 + eps)) (Jhunjhunwala et al., 2301.09604).

    The paper averages clients alike, and reports the mean of the last two models.
    """

    needs_mean: ClassVar[str] = (
        "strategy fedexp compares the lengths of clients' changes with that of their very mean: take "
        "aggregator mean and no channel, or fedavg with a server optimizer"
    )

    eps: float = 1e-3
    """Keeps the rate finite where all changes cancel."""

    def __post_init__(self) -> None:
        """Refuse a second server rate."""
        check(self, "strategy", eps=NOT_NEGATIVE)
        no_optimizer(self, "sets the server's rate itself")

    def numbers(self, ctx: Context, norms: Tensor) -> dict[str, Tensor]:
        """Each change's squared length."""
        return {"square": norms.square()}

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """Paper's eq. 7."""
        delta = mean["delta"]
        length = torch.stack([v.double().square().sum() for v in delta.values()]).sum()
        rate = (mean["numbers"]["square"] / (2 * (length + self.eps))).clamp(min=1)
        return {k: rate * v for k, v in delta.items()}, extras
