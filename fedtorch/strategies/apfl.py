"""APFL: each client uses a mix of the shared model and one of its own, and learns how much of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedtorch.options import FRACTION, check
from fedtorch.strategies.base import Solve, Strategy
from fedtorch.strategies.needs import whole_models
from fedtorch.tree import per_client
from fedtorch.types import Context, Params, Stack


@dataclass(frozen=True, kw_only=True)
class APFL(Strategy):
    """FedAvg of w; a client uses alpha v + (1 - alpha) w (Deng et al. 2020, arXiv:2003.13461, Alg. 1).

    On each batch v steps by alpha times the gradient g at the mix, and alpha, where it is learned, by
    <v - w, g>. Weights are mixed, not outputs; v and alpha stay with the client. Steps of v are plain SGD.
    """

    apart: ClassVar[bool] = True
    steps_itself: ClassVar[bool] = True

    alpha: float = 0.5
    """Share of a client's own model, at first."""
    learn: bool = False
    """Whether each client learns its share. v steps alpha times as far as w, so that in long visits w gets
    ahead of it and alpha falls to 0: what is used is then the shared model."""

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        check(self, "strategy", alpha=FRACTION)

    def prepare(self, model: nn.Module) -> Strategy:
        """Raises ConfigError where weights are not all that there is to mix."""
        whole_models(self, model)
        return self

    def remember(self, params: Params) -> dict[str, Params]:
        """v, at first the model as it was sent, and alpha."""
        like = next(iter(params.values()))
        return {"v": dict(params), "alpha": {"alpha": like.new_tensor(self.alpha)}}

    def train(self, solve: Solve, ctx: Context) -> tuple[object, dict[str, Stack]]:
        """The shared pass; then v and alpha on the same batches, beside the same steps of w."""
        shared, w, v = solve(), ctx.anchor, ctx.memory["v"]
        alpha = ctx.memory["alpha"]["alpha"]
        for t in range(int(ctx.steps.max())):
            mix, at_w = blend(alpha, v, w), ctx.data.grad(w, t)[0]
            g = ctx.data.grad(mix, t)[0]
            pull = torch.stack(
                [((v[k] - w[k]) * g[k]).reshape(len(g[k]), -1).sum(1) for k in g]
            ).sum(0)
            v = {k: v[k] - ctx.lr * per_client(alpha, g[k]) * g[k] for k in g}
            w = {k: w[k] - ctx.lr * at_w[k] for k in g}
            if self.learn:
                alpha = (alpha - ctx.lr * pull).clamp(0, 1)
        return shared, {"v": v, "alpha": {"alpha": alpha}}

    def own(
        self, params: Params, memory: dict[str, Params], extras: Mapping[str, Params] = {}
    ) -> Params:
        """The mix with the shared weights as they are now."""
        if not memory:
            return {}
        return blend(memory["alpha"]["alpha"], memory["v"], params)


def blend(alpha: Tensor, v: Params, w: Params) -> Params:
    """The mix of one client, or with a leading axis, of each."""
    found = {}
    for k, own in v.items():
        share = per_client(alpha, own) if alpha.dim() else alpha
        found[k] = share * own + (1 - share) * w[k].to(own)
    return found
