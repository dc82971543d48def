"""Ditto: beside the shared model each client trains one of its own, which is drawn to the shared one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedtorch.options import NOT_NEGATIVE, check
from fedtorch.strategies.base import Solve, Strategy
from fedtorch.strategies.fedprox import FedProx
from fedtorch.types import Context, Params, Stack


@dataclass(frozen=True, kw_only=True)
class Ditto(Strategy):
    """FedAvg of w; each client also steps v_k by its gradient plus lam (v_k - w) (Li et al., 2012.04221).

    v_k, with its own statistics, stays with the client and is what it uses; it is drawn to the model that
    the client was sent. Nothing of it is in what is sent.
    """

    floats: ClassVar[bool] = True
    apart: ClassVar[bool] = True
    draws_by: ClassVar[str] = "lam"

    lam: float = 1.0
    """How strongly v_k is drawn to the shared model; 0: each client trains alone."""

    def __post_init__(self) -> None:
        """Refuse a negative or NaN weight."""
        check(self, "strategy", lam=NOT_NEGATIVE)

    def remember(self, params: Params) -> dict[str, Params]:
        """v_k, at first the model as it was sent."""
        return {"v": dict(params)}

    def train(self, solve: Solve, ctx: Context) -> tuple[object, dict[str, Stack]]:
        """Two passes over the same batches."""
        shared = solve()
        weights, buffers = solve(start=ctx.memory["v"], strategy=FedProx(mu=self.lam)).rows()
        return shared, {"v": weights | buffers}

    def own(
        self, params: Params, memory: dict[str, Params], extras: Mapping[str, Params] = {}
    ) -> Params:
        """v_k in place of the shared weights."""
        return memory.get("v", {})
