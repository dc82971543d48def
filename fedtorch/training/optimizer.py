"""Server optimizers (Reddi et al. 2021, arXiv:2003.00295, Alg. 2) and the client's torch optimizer.

A server optimizer treats the clients' mean delta as a step direction. State goes in and comes out; all
of it is float64, so that a run does not depend on the order of small additions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedtorch.options import POSITIVE, SHARE, check, find
from fedtorch.tree import tmap
from fedtorch.types import ConfigError, Params

State = dict[str, Params]


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """Base: named state groups, one pure step. ``step`` returns what is added to the weights."""

    lr: float = 1.0
    """Server learning rate."""

    def __post_init__(self) -> None:
        """Refuse rates and memories that cannot train."""
        shares = {"momentum": SHARE, "beta1": SHARE, "beta2": SHARE}
        check(self, "strategy.server", lr=POSITIVE, tau=POSITIVE, **shares)

    def init(self, params: Params) -> State:
        """State before the first round."""
        return {}

    def step(self, delta: Params, state: State) -> tuple[Params, State]:
        """Mean delta and state -> what to add to the weights, and the next state."""
        raise ConfigError(f"{type(self).__name__} has no step; choose sgd, adam, yogi or adagrad")


@dataclass(frozen=True, kw_only=True)
class ServerSGD(ServerOptimizer):
    """Delta times lr; with momentum it is FedAvgM (Hsu et al. 2019, arXiv:1909.06335)."""

    momentum: float = 0.0
    """v <- momentum v + delta; 0.9 is the paper's choice."""

    def init(self, params: Params) -> State:
        """Velocity, zero at first."""
        return {"v": zeros(params)} if self.momentum else {}

    def step(self, delta: Params, state: State) -> tuple[Params, State]:
        """W <- w + lr v."""
        if self.momentum:
            delta = tmap(lambda v, d: self.momentum * v + d, state["v"], delta)
            state = {"v": delta}
        return tmap(lambda d: self.lr * d, delta), state


@dataclass(frozen=True, kw_only=True)
class _Adaptive(ServerOptimizer):
    """m <- beta1 m + (1 - beta1) delta;  w <- w + lr m / (sqrt(v) + tau).  No bias correction."""

    lr: float = 0.01
    """Server learning rate."""
    beta1: float = 0.9
    """Memory of the mean delta."""
    tau: float = 1e-3
    """Adaptivity floor: the smaller, the more each coordinate gets its own step size."""

    def init(self, params: Params) -> State:
        """First moment zero; second moment tau^2, the least the paper allows."""
        return {"m": zeros(params), "v": tmap(lambda z: z + self.tau**2, zeros(params))}

    def step(self, delta: Params, state: State) -> tuple[Params, State]:
        """One step of Alg. 2; which optimizer it is lies in ``second_moment`` alone."""
        m = tmap(lambda m, d: self.beta1 * m + (1 - self.beta1) * d, state["m"], delta)
        v = tmap(lambda v, d: self.second_moment(v, d * d), state["v"], delta)
        return tmap(lambda m, v: self.lr * m / (v.sqrt() + self.tau), m, v), {"m": m, "v": v}

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """V of the next round from v and delta^2: Adagrad's sum."""
        return v + square


@dataclass(frozen=True, kw_only=True)
class ServerAdagrad(_Adaptive):
    """FedAdagrad: v <- v + delta^2. The paper runs it with beta1 = 0."""

    beta1: float = 0.0
    """Memory of the mean delta."""


@dataclass(frozen=True, kw_only=True)
class ServerAdam(_Adaptive):
    """FedAdam: v <- beta2 v + (1 - beta2) delta^2."""

    beta2: float = 0.99
    """Memory of the squared delta."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Exponential mean."""
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True)
class ServerYogi(_Adaptive):
    """FedYogi: v <- v - (1 - beta2) delta^2 sign(v - delta^2)."""

    beta2: float = 0.99
    """Memory of the squared delta."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Additive, so that v shrinks slowly when deltas become small."""
        return v - (1 - self.beta2) * square * torch.sign(v - square)


@dataclass(frozen=True)
class ClientOptimizer:
    """Any ``torch.optim`` optimizer by name or dotted path, made anew for each visit."""

    name: str = "SGD"
    """Class in torch.optim (any case), or ``package.module.Class``."""
    args: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments other than lr, e.g. ``{"momentum": 0.9}``."""

    def __post_init__(self) -> None:
        """Refuse what is no name and no arguments."""
        check(self, "optimizer")

    def build(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        """An optimizer over ``params``."""
        return self.cls()(params, lr=lr, **self.args)  # type: ignore[call-arg]

    def stepper(self, params: Sequence[Tensor], lr: float) -> Callable[[], Any]:
        """What moves ``params`` along their gradients: a fresh optimizer's ``step``.

        SGD on a CPU is done here: the same arithmetic without the profiler and compiler entries around
        torch's own, which take longer than the step of a small model.
        """
        asked = {k: v for k, v in self.args.items() if v}
        here = asked.keys() <= {"momentum", "dampening", "weight_decay", "nesterov"}
        if here and self.cls() is torch.optim.SGD and params[0].device.type == "cpu":
            return Descent(params, lr, **asked)
        return self.build(params, lr).step

    def cls(self) -> type[torch.optim.Optimizer]:
        """The optimizer class; raises ConfigError for what cannot run without a closure."""
        found = by_name()
        key = self.name.lower()
        if key in found:
            return found[key]
        if "." not in key and ":" not in key:
            raise ConfigError(
                f"unknown client optimizer {self.name!r}; there are {', '.join(sorted(found))}, "
                "or give package.module.Class"
            )
        cls = find(self.name)
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise ConfigError(
                f"{self.name!r} is no optimizer: it must subclass torch.optim.Optimizer"
            )
        return cls

    def check(self) -> None:
        """Try the constructor on one number, so that a wrong option is named before training."""
        if self.cls() is torch.optim.SGD and not self.args:
            return  # torch's first optimizer imports torch._dynamo: a second that this one never needs
        try:
            self.build([torch.zeros(1, 1, requires_grad=True)], lr=0.1)  # Muon takes matrices alone
        except (TypeError, ValueError) as e:
            raise ConfigError(f"client optimizer {self.name}: {e}") from e

    @property
    def elementwise(self) -> bool:
        """Whether a step on stacked weights is the K clients' own steps."""
        return self.cls() in ELEMENTWISE


ELEMENTWISE = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.ASGD,
}
"""Each number's step depends on that number's own history alone."""

NEED_MORE = {"LBFGS", "SparseAdam", "Optimizer"}
"""LBFGS wants a closure, SparseAdam sparse gradients: neither fits a local step."""


class Descent:
    """``torch.optim.SGD``, bit for bit; parameters without a gradient stay as they are."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.momentum, self.fresh, self.nesterov = momentum, 1 - dampening, nesterov
        self.velocity: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self) -> None:
        """One step."""
        for k, p in enumerate(self.params):
            g = p.grad
            if g is None:
                continue
            if self.weight_decay:
                g = g.add(p, alpha=self.weight_decay)
            if self.momentum:
                g = self._heavy(k, g)
            p.add_(g, alpha=-self.lr)

    def _heavy(self, k: int, g: Tensor) -> Tensor:
        if k not in self.velocity:
            self.velocity[k] = g.clone()
        else:
            self.velocity[k].mul_(self.momentum).add_(g, alpha=self.fresh)
        v = self.velocity[k]
        return g.add(v, alpha=self.momentum) if self.nesterov else v


@cache
def by_name() -> dict[str, type[torch.optim.Optimizer]]:
    """Lower-case name -> class, for every torch.optim optimizer that fits a local step."""
    return {
        n.lower(): c
        for n, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and n not in NEED_MORE
    }


def zeros(params: Params) -> Params:
    """Float64 zeros of the same shapes."""
    return tmap(lambda p: torch.zeros_like(p, dtype=torch.float64), params)
