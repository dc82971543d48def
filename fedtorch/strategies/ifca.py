"""IFCA: several models, and each client trains and uses the one that fits its data best."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.options import POSITIVE, Range, check
from fedtorch.strategies.base import Solve, Strategy
from fedtorch.strategies.needs import no_optimizer, whole_models
from fedtorch.tree import per_client, tmap
from fedtorch.types import Context, Params, Stack

SEVERAL = Range("at least 2", 2, float("inf"), "high")


@dataclass(frozen=True, kw_only=True)
class IFCA(Strategy):
    """A client trains the model of least loss on its data (Ghosh et al. 2020, arXiv:2006.04088, Alg. 1).

    Each model moves by the mean change of those that picked it, and stays where nobody did. The server's
    own model is the first; the others, in groups m1, m2, ..., start from it with noise. All of them are
    sent down, and as much comes up, zeros but for one.
    """

    needs_mean: ClassVar[str] = (
        "strategy ifca divides what the members of a cluster send by how many they are: take "
        "aggregator mean and no channel, or fedavg"
    )

    clusters: int = 2
    """Models."""
    spread: float = 1.0
    """Noise on the starts of the others, in deviations of each tensor: what starts alike stays so."""
    seed: int = 0
    """Of that noise: a bad start may leave one cluster empty, and another may not."""

    def __post_init__(self) -> None:
        """Refuse one model, which is FedAvg's, and a server optimizer, which knows of one."""
        check(self, "strategy", clusters=SEVERAL, spread=POSITIVE)
        no_optimizer(self, "has several models")

    @property
    def asks(self) -> bool:
        """For losses."""
        return True

    def prepare(self, model: nn.Module) -> Strategy:
        """Raises ConfigError where there is more than weights."""
        whole_models(self, model)
        return self

    def init(self, params: Params) -> dict[str, Params]:
        """The other models."""

        def noisy(v: Tensor, *purpose: str | int) -> Tensor:
            draw = torch.randn(v.shape, generator=seeds.generator(self.seed, "ifca", *purpose))
            return v + self.spread * v.std(correction=0) * draw.to(v)

        others = range(1, self.clusters)
        return {f"m{j}": {k: noisy(v, j, k) for k, v in params.items()} for j in others}

    def remember(self, params: Params) -> dict[str, Params]:
        """Which model was picked last."""
        return {"pick": {"pick": torch.zeros(())}}

    def train(self, solve: Solve, ctx: Context) -> tuple[object, dict[str, Stack]]:
        """Paper's lines 6 to 9."""
        losses = torch.stack([ctx.data.loss(m) for m in self._models(ctx)])
        pick = losses.nan_to_num(torch.inf).argmin(0)
        start = {k: torch.cat([m[k] for m in self._models(ctx)])[pick] for k in ctx.anchor}
        return solve(start=start), {"pick": {"pick": pick.to(next(iter(start.values())))}}

    def upload(self, params: Stack, ctx: Context) -> tuple[dict[str, Stack], dict[str, Stack]]:
        """The change of the model that was picked, and none of the others."""
        sent = {}
        for j, model in enumerate(self._models(ctx)):
            mine = self._picked(ctx, j)
            change = tmap(lambda p, m, mine=mine: per_client(mine, p) * (p - m), params, model)
            sent[f"m{j}" if j else "delta"] = change
        return sent, {"pick": ctx.memory["pick"]}

    def numbers(self, ctx: Context, norms: Tensor) -> dict[str, Tensor]:
        """Who is a member of which."""
        return {f"m{j}": self._picked(ctx, j).cpu() for j in range(self.clusters)}

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """Means over members; of nobody's it stays."""

        def moved(j: int, group: str) -> Params:
            part = mean["numbers"][f"m{j}"].double()
            return {k: torch.where(part > 0, v.double() / part, 0) for k, v in mean[group].items()}

        new = {
            g: tmap(lambda m, d: (m.double() + d).to(m.dtype), m, moved(int(g[1:]), g))
            for g, m in extras.items()
        }
        return moved(0, "delta"), new

    def own(
        self, params: Params, memory: dict[str, Params], extras: Mapping[str, Params] = {}
    ) -> Params:
        """The model that was picked last, as it is now."""
        pick = int(memory["pick"]["pick"]) if memory else 0
        return dict(extras[f"m{pick}"]) if pick else {}

    def _models(self, ctx: Context) -> list[Stack]:
        return [ctx.anchor, *(ctx.extras[f"m{j}"] for j in range(1, self.clusters))]

    def _picked(self, ctx: Context, j: int) -> Tensor:
        return (ctx.memory["pick"]["pick"] == j).double()
