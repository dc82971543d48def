"""Server optimizers (Reddi et al. 2021, arXiv:2003.00295, Alg. 2) and the client's torch optimizer.

A server optimizer treats the clients' mean delta as a step direction. State goes in and comes out; all
of it is float64, so that a run does not depend on the order of small additions.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fedtorch.options import POSITIVE, SHARE, brief, briefly, check, find, fit, near, shown
from fedtorch.tree import tmap
from fedtorch.types import ConfigError, Params

Moments = dict[str, Params]


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """Base: named state groups, one pure step. ``step`` returns what is added to the weights."""

    def __init_subclass__(cls) -> None:
        """Show what differs from the defaults."""
        briefly(cls)

    lr: float = 1.0
    """Server learning rate."""

    def __post_init__(self) -> None:
        """Refuse rates and memories that cannot train."""
        shares = {"momentum": SHARE, "beta1": SHARE, "beta2": SHARE}
        check(self, "strategy.server", lr=POSITIVE, tau=POSITIVE, **shares)

    def init(self, params: Params) -> Moments:
        """State before the first round."""
        return {}

    def step(self, delta: Params, state: Moments) -> tuple[Params, Moments]:
        """Mean delta and state -> what to add to the weights, and the next state."""
        raise ConfigError(f"{type(self).__name__} has no step; choose sgd, adam, yogi or adagrad")

    def step_from(self, params: Params, delta: Params, state: Moments) -> tuple[Params, Moments]:
        """The same for what also looks at the weights."""
        return self.step(delta, state)


@dataclass(frozen=True, kw_only=True)
class ServerSGD(ServerOptimizer):
    """Delta times lr; with momentum it is FedAvgM (Hsu et al. 2019, arXiv:1909.06335)."""

    momentum: float = 0.0
    """v <- momentum v + delta; 0.9 is the paper's choice."""

    def init(self, params: Params) -> Moments:
        """Velocity, zero at first."""
        return {"v": zeros(params)} if self.momentum else {}

    def step(self, delta: Params, state: Moments) -> tuple[Params, Moments]:
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

    def init(self, params: Params) -> Moments:
        """First moment zero; second moment tau^2, the least the paper allows."""
        return {"m": zeros(params), "v": tmap(lambda z: z + self.tau**2, zeros(params))}

    def step(self, delta: Params, state: Moments) -> tuple[Params, Moments]:
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
class ServerLAMB(ServerAdam):
    """FedLAMB: Adam's direction u in steps lr |w| / |u| of each tensor (arXiv:1904.00962, 2110.00532)."""

    def step_from(self, params: Params, delta: Params, state: Moments) -> tuple[Params, Moments]:
        """The ratio is 1 where a tensor or its direction is zero."""
        found, state = self.step(delta, state)

        def step(w: Tensor, u: Tensor) -> Tensor:
            length, way = w.double().norm(), u.norm() / self.lr
            return u * (length / way) if length > 0 and way > 0 else u

        return tmap(step, {k: params[k] for k in found}, found), state


@dataclass(frozen=True, kw_only=True)
class ServerYogi(_Adaptive):
    """FedYogi: v <- v - (1 - beta2) delta^2 sign(v - delta^2)."""

    beta2: float = 0.99
    """Memory of the squared delta."""

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """Additive, so that v shrinks slowly when deltas become small."""
        return v - (1 - self.beta2) * square * torch.sign(v - square)


Maker = Callable[..., Any]
"""A class of optimizers, or ``fn(model, lr)``."""


@dataclass(frozen=True)
class ClientOptimizer:
    """A torch optimizer by name, by class or from a function, made anew for each visit.

    What it keeps of earlier gradients does not outlive the visit.
    """

    __repr__ = brief

    name: str | Maker = "SGD"
    """Class in torch.optim (any case), ``package.module.Class``, a class, or ``fn(model, lr)``: it gives
    an optimizer, or several, of all trainable parameters, by ``lr`` of the round."""
    args: dict[str, Any] = field(default_factory=dict)
    """Other arguments of the class or function, e.g. ``{"momentum": 0.9}``."""

    def __post_init__(self) -> None:
        """Refuse what is no optimizer and no arguments."""
        if isinstance(self.name, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer is an object of {type(self.name).__name__}, made for one model's weights, but "
                "every visit makes its own: give the class, or a function fn(model, lr)"
            )
        if not (isinstance(self.name, str) or callable(self.name)):
            raise ConfigError(
                f"optimizer must be a name, a class or a function fn(model, lr), got {shown(self.name)}"
            )
        fit("optimizer.args", self.args, dict)

    @classmethod
    def of(cls, given: "ClientOptimizer | str | Maker") -> "ClientOptimizer":
        """What a recipe was given; a ``functools.partial`` of a class is the class and its arguments."""
        if isinstance(given, ClientOptimizer):
            return given
        if isinstance(given, partial) and isinstance(given.func, type) and not given.args:
            return cls(given.func, given.keywords)
        return cls(given)

    @property
    def words(self) -> str:
        """What it is called in messages."""
        if isinstance(self.name, str):
            return self.name
        made = getattr(self.name, "func", self.name)  # of a functools.partial
        return getattr(made, "__name__", type(made).__name__)

    def maker(self) -> Maker:
        """The class or function; raises ConfigError for what cannot step by a gradient alone."""
        found = self.name
        if isinstance(found, str):
            known, key = by_name(), found.lower()
            if key not in known and not {".", ":"} & {*key}:
                for kind in NEED_MORE:
                    fits_not(kind if kind.__name__.lower() == key else None)
                raise ConfigError(
                    f"unknown client optimizer {found!r}; there are {', '.join(sorted(known))}, "
                    f"or give package.module.Class{near(found, known)}"
                )
            found = known.get(key) or find(found)
        if not callable(found) or (
            isinstance(found, type) and not issubclass(found, torch.optim.Optimizer)
        ):
            raise ConfigError(
                f"{self.words!r} is no optimizer: it must subclass torch.optim.Optimizer, or be a "
                "function fn(model, lr)"
            )
        fits_not(found)
        return found

    def build(self, params: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        """The class's optimizer over ``params``."""
        made: torch.optim.Optimizer = self.maker()(params, lr=lr, **self.args)
        return made

    def check(self) -> None:
        """Try the constructor on one number, so that a wrong option is named before training."""
        made = self.maker()
        if made is torch.optim.SGD and not self.args:
            return  # torch's first optimizer imports torch._dynamo: a second that this one never needs
        if not isinstance(made, type):
            return  # a function needs the model
        if "lr" in self.args:
            raise ConfigError(
                f"client optimizer {self.words} takes its rate from the recipe: give lr"
            )
        known = inspect.signature(made).parameters
        others = {v.kind for v in known.values()} & {inspect.Parameter.VAR_KEYWORD}
        if wrong := [k for k in self.args if k not in known and not others]:
            options = [k for k in known if k not in ("params", "lr")]
            raise ConfigError(
                f"client optimizer {self.words} has no option {wrong[0]!r}; it has "
                f"{', '.join(options)}{near(wrong[0], options)}"
            )
        try:
            self.build([torch.zeros(1, 1, requires_grad=True)], lr=0.1)  # Muon takes matrices alone
        except (TypeError, ValueError) as e:
            raise ConfigError(f"client optimizer {self.words}: {e}") from e

    @property
    def elementwise(self) -> bool:
        """Whether a step on stacked weights is the K clients' own steps."""
        return self.maker() in ELEMENTWISE


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

NEED_MORE = {
    torch.optim.LBFGS: "computes the loss anew within a step (a closure)",
    torch.optim.SparseAdam: "takes sparse gradients alone",
}
"""What a local step has not."""


def fits_not(kind: Any) -> None:
    """Raises ConfigError for a class that cannot step by a gradient alone."""
    if kind in NEED_MORE:
        raise ConfigError(
            f"client optimizer {kind.__name__} {NEED_MORE[kind]}, which a local step does not offer: take "
            "another, or a local update of your own (Recipe(local=fn))"
        )


@cache
def by_name() -> dict[str, type[torch.optim.Optimizer]]:
    """Lower-case name -> class, for every torch.optim optimizer that fits a local step."""
    return {
        n.lower(): c
        for n, c in vars(torch.optim).items()
        if isinstance(c, type)
        and issubclass(c, torch.optim.Optimizer)
        and c not in (*NEED_MORE, torch.optim.Optimizer)
    }


def zeros(params: Params) -> Params:
    """Float64 zeros of the same shapes."""
    return tmap(lambda p: torch.zeros_like(p, dtype=torch.float64), params)
