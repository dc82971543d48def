"""Client momentum: what a client sends is a mean over its visits, in which a liar has less room to hide."""

from dataclasses import dataclass

import torch

from fedtorch.options import SHARE, check
from fedtorch.strategies.base import Strategy
from fedtorch.tree import tmap
from fedtorch.types import Context, Params, Stack


@dataclass(frozen=True, kw_only=True)
class ClientMomentum(Strategy):
    """Each client sends m_k <- beta m_k + (1 - beta) delta_k (Karimireddy et al. 2021, arXiv:2012.10333).

    m_k outlives the visit, which momentum of the client's optimizer does not. With a robust aggregator it
    takes the noise of single visits off what the rule compares.
    """

    beta: float = 0.9
    """Memory of earlier changes; 0 is FedAvg."""

    def __post_init__(self) -> None:
        """Refuse a memory that never forgets."""
        check(self, "strategy", beta=SHARE)

    def remember(self, params: Params) -> dict[str, Params]:
        """m_k, zero at first."""
        return {"m": tmap(torch.zeros_like, params)}

    def upload(self, params: Stack, ctx: Context) -> tuple[dict[str, Stack], dict[str, Stack]]:
        """m_k in place of the change."""
        delta = tmap(torch.sub, params, ctx.anchor)
        m = tmap(lambda m, d: self.beta * m + (1 - self.beta) * d, ctx.memory["m"], delta)
        return {"delta": m}, {"m": m}

    def confirm(
        self, sent: dict[str, Stack], memory: dict[str, Stack], ctx: Context
    ) -> dict[str, Stack]:
        """As it was clipped."""
        return {"m": sent["delta"]}
