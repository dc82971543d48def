"""FedNova: whoever takes more steps, or longer ones, does not count for more."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtorch.options import NOT_NEGATIVE, check
from fedtorch.strategies.base import Correction, Strategy
from fedtorch.types import Context, Params


@dataclass(frozen=True, kw_only=True)
class FedNova(Strategy):
    """Changes are averaged by step: w + (sum p |a|) sum p delta / |a| (Wang et al. 2020, arXiv:2007.07481).

    |a_k| is how far client k's SGD goes where every gradient is 1: its number of steps, and with momentum,
    weight decay, a proximal term or changing rates what these make of it.
    """

    sgd: ClassVar[bool] = True
    draws_by: ClassVar[str] = "mu"

    mu: float = 0.0
    """Weight of a proximal term, as FedProx has it."""

    def __post_init__(self) -> None:
        """Refuse a negative or NaN weight."""
        check(self, "strategy", mu=NOT_NEGATIVE)

    def correction(self, ctx: Context) -> Correction:
        """The gradient of the proximal term."""
        return Correction(pull=self.mu)

    def scale(self, ctx: Context, norms: Tensor) -> Tensor:
        """1 / |a|; a visit without a step changed nothing."""
        reach = self._reach(ctx)
        return torch.where(reach > 0, 1 / reach, 0)

    def numbers(self, ctx: Context, norms: Tensor) -> dict[str, Tensor]:
        """|a|, of which the server needs the mean."""
        return {"reach": self._reach(ctx)}

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """Paper's eq. 6, with tau_eff the mean of |a|."""
        reach = mean["numbers"]["reach"].double()
        return {k: reach * v for k, v in mean["delta"].items()}, extras

    def _reach(self, ctx: Context) -> Tensor:
        return ctx.steps.double() if ctx.reach is None else ctx.reach(self.mu)
