"""FedDyn: each client's loss is tilted so that all of them agree where the whole loss is least."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedtorch.options import POSITIVE, check
from fedtorch.strategies.base import Correction, Strategy
from fedtorch.tree import tmap
from fedtorch.types import Context, Params, Stack


@dataclass(frozen=True, kw_only=True)
class FedDyn(Strategy):
    """Local gradients less g_k, plus alpha (w - w_t) (Acar et al. 2021, arXiv:2111.04263, Alg. 1).

    g_k <- g_k - alpha delta_k on the client; h <- h - alpha (1/m) sum delta_k and w = w_t + mean delta_k -
    h / alpha on the server, of all m clients. The model that is sent, with h in it, is the one that is
    evaluated. With few clients a round h grows: take a smaller alpha.
    """

    needs_mean: ClassVar[str] = (
        "strategy feddyn needs the mean of what clients send: what the server keeps is no more the "
        "mean of what clients keep; take aggregator mean and no channel, or fedavg or fedprox"
    )

    draws_by: ClassVar[str] = "alpha"

    alpha: float = 0.1
    """How strongly clients are tied to the global model."""
    weighting: Literal["auto", "examples", "uniform"] = "uniform"
    """The paper's mean."""

    def __post_init__(self) -> None:
        """Refuse what would divide by zero."""
        check(self, "strategy", alpha=POSITIVE)

    def hold(self, params: Params) -> dict[str, Params]:
        """The server's h, zero at first."""
        return {"h": tmap(lambda p: torch.zeros_like(p, dtype=torch.float64), params)}

    def remember(self, params: Params) -> dict[str, Params]:
        """The client's g_k, zero at first."""
        return {"g": tmap(torch.zeros_like, params)}

    def correction(self, ctx: Context) -> Correction:
        """The gradient of -<g_k, w> + alpha/2 |w - w_t|^2."""
        return Correction(pull=self.alpha, shift=tmap(torch.neg, ctx.memory["g"]))

    def confirm(
        self, sent: dict[str, Stack], memory: dict[str, Stack], ctx: Context
    ) -> dict[str, Stack]:
        """By what the server really has."""
        moved = tmap(lambda g, d: g.sub(d, alpha=self.alpha), ctx.memory["g"], sent["delta"])
        return {"g": moved}

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """``share`` of all clients sent this mean."""
        h = tmap(lambda h, d: h.sub(d, alpha=self.alpha * share), extras["h"], mean["delta"])
        return tmap(lambda d, h: d.sub(h, alpha=1 / self.alpha), mean["delta"], h), {"h": h}
