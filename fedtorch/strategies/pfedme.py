"""pFedMe: what is shared is where clients' own models meet, each drawn to it by a spring."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from fedtorch.options import COUNT, POSITIVE, check
from fedtorch.strategies.base import Solve, Strategy
from fedtorch.strategies.needs import whole_models
from fedtorch.tree import per_client
from fedtorch.types import Context, Params, Stack


@dataclass(frozen=True, kw_only=True)
class PFedMe(Strategy):
    """theta_k steps by its gradient + lam (theta_k - w_k), w_k follows it (Dinh et al., arXiv:2006.08848).

    Alg. 1: on each batch theta_k takes its steps, then w_k goes lr lam of the way. theta_k is what the
    client uses; it starts from w in every visit. The paper averages clients alike; its beta is the rate of
    a server optimizer (sgd). lr lam must be below 1.
    """

    steps_itself: ClassVar[bool] = True

    lam: float = 5.0
    """How strongly theta_k is drawn to w_k; the smaller, the more a client's own."""
    inner_steps: int = 5
    """Steps of theta_k on each batch."""
    inner_lr: float | None = None
    """Their learning rate; none: the run's."""
    weighting: Literal["auto", "examples", "uniform"] = "uniform"
    """The paper's mean."""

    def __post_init__(self) -> None:
        """Refuse what takes no step."""
        check(self, "strategy", lam=POSITIVE, inner_steps=COUNT, inner_lr=POSITIVE)

    @property
    def asks(self) -> bool:
        """What is sent is made of gradients that are asked for."""
        return True

    def overshoots(self, lr: float) -> bool:
        """From lr lam of 1 on: each step goes that share of the way to the other model."""
        return max(lr, self.inner_lr or lr) * self.lam >= 1

    def prepare(self, model: nn.Module) -> Strategy:
        """Raises ConfigError where there is more than weights."""
        whole_models(self, model)
        return self

    def remember(self, params: Params) -> dict[str, Params]:
        """theta_k, at first the model as it was sent."""
        return {"theta": dict(params)}

    def train(self, solve: Solve, ctx: Context) -> tuple[object, dict[str, Stack]]:
        """Paper's lines 4 to 8."""
        lr, clients = self.inner_lr or ctx.lr, len(ctx.steps)
        w = {k: v.expand(clients, *v.shape[1:]) for k, v in ctx.anchor.items()}
        theta, total = w, torch.zeros(clients).double()
        for t in range(int(ctx.steps.max())):
            # 0 for clients whose steps are over
            pull = {k: self.lam * per_client((t < ctx.steps).to(v), v) for k, v in w.items()}
            for i in range(self.inner_steps):
                grads, losses = ctx.data.grad(theta, t)
                total += losses if i == 0 else 0
                theta = {k: v - lr * (grads[k] + pull[k] * (v - w[k])) for k, v in theta.items()}
            w = {k: v - ctx.lr * pull[k] * (v - theta[k]) for k, v in w.items()}
        return solve.ends(w, total / ctx.steps), {"theta": theta}

    def own(
        self, params: Params, memory: dict[str, Params], extras: Mapping[str, Params] = {}
    ) -> Params:
        """theta_k in place of the shared weights."""
        return memory.get("theta", {})
