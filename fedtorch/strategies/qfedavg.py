"""q-FedAvg: whom the model serves badly counts for more."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedtorch.options import NOT_NEGATIVE, check
from fedtorch.strategies.base import Strategy
from fedtorch.strategies.needs import no_optimizer
from fedtorch.types import Context, Params

LEAST_LOSS = 1e-10
"""Loss of a client that has none left: 0 ** (q - 1) is no number."""


@dataclass(frozen=True, kw_only=True)
class QFedAvg(Strategy):
    """w + sum F^q delta / sum (q F^(q-1) |delta|^2 / lr + F^q) (Li et al. 2020, arXiv:1905.10497, Alg. 2).

    F_k is the loss of client k at w as it was sent, before any step, over all of its training examples,
    and 1 / lr the paper's L. Clients count alike.
    """

    needs_mean: ClassVar[str] = (
        "strategy qfedavg sets its rate by the lengths of the very changes that are summed: take "
        "aggregator mean and no channel, or fedavg"
    )

    q: float = 1.0
    """How much more a client with a large loss counts; 0 is FedAvg with clients alike."""
    weighting: Literal["auto", "examples", "uniform"] = "uniform"
    """The paper's sums."""

    def __post_init__(self) -> None:
        """Refuse a second server rate, and a power that would prefer those that fare well."""
        check(self, "strategy", q=NOT_NEGATIVE)
        no_optimizer(self, "sets the server's rate itself")

    @property
    def asks(self) -> bool:
        """For each client's loss."""
        return True

    def scale(self, ctx: Context, norms: Tensor) -> Tensor:
        """F^q."""
        return ctx.data.loss().clamp(min=LEAST_LOSS) ** self.q

    def numbers(self, ctx: Context, norms: Tensor) -> dict[str, Tensor]:
        """What the paper's h_k is, over L."""
        loss = ctx.data.loss().clamp(min=LEAST_LOSS)
        curved = self.q * loss ** (self.q - 1) * norms.square() / ctx.lr if ctx.lr else 0 * loss
        return {"h": curved + loss**self.q}

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """Both sums are over the same clients, so that their means do."""
        h = mean["numbers"]["h"].double()
        return {k: v.double() / h for k, v in mean["delta"].items()}, extras
