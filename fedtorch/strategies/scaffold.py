"""SCAFFOLD: control variates correct each client's drift."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedtorch.strategies.base import Correction, Following, Strategy
from fedtorch.tree import tmap
from fedtorch.types import Context, Params, Stack


@dataclass(frozen=True, kw_only=True)
class Scaffold(Strategy):
    """Local gradients are shifted by c - c_k (Karimireddy et al. 2020, arXiv:1910.06378, Alg. 1).

    Option 2: c_k+ = c_k - c + (w_t - w_k) / (steps * lr), where the learning rate changes within a visit by
    the sum of its steps'. Option 1: c_k+ is the gradient at w_t over all of the client's data, one more
    pass, which is right for any client optimizer and any number of steps. The paper averages clients alike
    and steps with plain SGD; other client optimizers run, outside its analysis.
    """

    needs_mean: ClassVar[str] = (
        "strategy scaffold needs the mean of what clients send: control variates that are no more the "
        "mean of the clients' draw the model away; take aggregator mean and no channel, or strategy "
        "fedavg or fedprox"
    )

    weighting: Literal["auto", "examples", "uniform"] = "uniform"
    """The paper's mean; 'examples' weighs deltas and control variates by client size."""
    option: Literal[1, 2] = 2
    """How control variates are made: 1 by a gradient, 2 by the steps that were taken."""

    @property
    def asks(self) -> bool:
        """Option 1 asks for gradients."""
        return self.option == 1

    @property
    def needs_rates(self) -> bool:
        """Option 2 divides by the rates of the steps."""
        return self.option == 2

    @property
    def only_delta(self) -> bool:
        """Of option 2 the change of c_k is a multiple of the weights', less c."""
        own = type(self).upload, type(self).arrived
        return self.option == 2 and own == (Scaffold.upload, Strategy.arrived) and not self.personal

    def init(self, params: Params) -> dict[str, Params]:
        """The server's control variate c, zero at first."""
        return {"c": tmap(torch.zeros_like, params)}

    def remember(self, params: Params) -> dict[str, Params]:
        """The client's own control variate c_k, zero at first."""
        return {"c": tmap(torch.zeros_like, params)}

    def correction(self, ctx: Context) -> Correction:
        """Paper's line 10: g - c_k + c."""
        return Correction(shift=tmap(torch.sub, ctx.extras["c"], ctx.memory["c"]))

    def upload(self, params: Stack, ctx: Context) -> tuple[dict[str, Stack], dict[str, Stack]]:
        """Paper's lines 12-14: delta and the change of c_k are sent, the new c_k is kept."""
        sent, _ = super().upload(params, ctx)
        if self.option == 1:
            grad = {k: v.to(params[k]) for k, v in ctx.data.grad()[0].items()}
            return sent | {"c": tmap(torch.sub, grad, ctx.memory["c"])}, {"c": grad}
        return sent, {"c": tmap(torch.add, ctx.memory["c"], sent["c"])}

    def following(self, ctx: Context) -> Following:
        """Paper's line 12 of option 2: c_k moves by -c - delta / (steps lr)."""
        if self.option == 1:
            return {}
        c = ctx.extras["c"]
        if ctx.lr == 0:  # a schedule's end: no step was taken, so none says anything of the drift
            return {"c": (torch.zeros_like(ctx.lr_sum), tmap(torch.zeros_like, c))}
        return {"c": (-1 / ctx.lr_sum, tmap(torch.neg, c))}

    def confirm(
        self, sent: dict[str, Stack], memory: dict[str, Stack], ctx: Context
    ) -> dict[str, Stack]:
        """c_k moves by what the server really has, so that c stays the mean of all c_k."""
        return {"c": tmap(torch.add, ctx.memory["c"], sent["c"])}

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """Paper's line 17: c moves by |S|/N times the mean change."""
        c = tmap(lambda c, change: c + share * change.to(c.dtype), extras["c"], mean["c"])
        return mean["delta"], {"c": c}
