"""A strategy is a frozen dataclass of hyper-parameters with pure methods; every default is FedAvg."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedtorch.options import briefly, check
from fedtorch.training.optimizer import ServerOptimizer
from fedtorch.training.step import Step
from fedtorch.tree import per_client, tmap
from fedtorch.types import Context, Params, Stack

OF_CLIENTS = (
    "init", "remember", "rests", "train", "correction", "correct", "objective", "upload", "following",
    "scale", "numbers", "confirm", "arrived",
)  # fmt: skip
"""Methods that decide what a client does, beside the run's own steps."""

Following = dict[str, tuple[Tensor, Stack]]
"""Groups that follow from the change: how many times it they are, [K], and what is added, [1, ...]."""


class Correction(NamedTuple):
    """What is added to every gradient of a visit: ``pull (w - anchor) + shift``, linear in the weights."""

    pull: float = 0.0
    """How strongly the weights are drawn back to where the visit started."""
    shift: Stack | None = None
    """By the weights' names, [K, ...] or, for all clients alike, [1, ...]; none: a weight left out."""


class Solve(Protocol):
    """A visit's local steps, as often as a strategy asks for them."""

    def __call__(
        self,
        *,
        start: Stack | None = None,
        strategy: "Strategy | None" = None,
        rests: Collection[str] = (),
        epochs: int | None = None,
        steps: int | None = None,
    ) -> Any:
        """The clients' weights and float buffers after it: ``rows()`` gives both, [K, ...].

        ``start``: weights and buffers to start from in place of those that a visit starts from.
        ``strategy``: whose ``correction`` steps follow. ``rests``: weights that stay. ``epochs`` or
        ``steps``: in place of the run's. Under sample-level privacy the pass without any of these is
        noised, and is the one that may be sent.
        """

    def ends(self, weights: Stack, losses: Tensor) -> Any:
        """The same of a visit that came to these weights, [K, ...], and losses, [K], in its own way."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What a federated algorithm decides, on the client and on the server.

    Override the methods that differ; a method never stores to ``self``. Client methods see K clients
    at once: everything that varies per client has a leading axis.
    """

    def __init_subclass__(cls) -> None:
        """Show what differs from the defaults."""
        briefly(cls)

    draws_by: ClassVar[str] = ""
    """The option that says how strongly steps draw weights to the model as it was sent, where one does."""
    floats: ClassVar[bool] = False
    """Whether ``remember`` is given float buffers beside the weights."""
    sgd: ClassVar[bool] = False
    """Whether its equations hold for clients that train with SGD alone."""
    needs_mean: ClassVar[str] = ""
    """A sentence that refuses another rule or a code, where it needs the very mean of what clients sent."""

    server: ServerOptimizer | None = None
    """Server optimizer fed with the mean delta; none: the mean delta is simply added."""
    weighting: Literal["auto", "examples", "uniform"] = "auto"
    """Average clients by their number of examples, or all alike; auto: by examples, under privacy alike."""
    personal: tuple[str, ...] = ()
    """Weights and buffers that stay with each client, by name ("head.*") or kind of layer ("@BatchNorm"),
    and are neither sent nor averaged."""

    apart: ClassVar[bool] = False
    """Whether of its passes one ``solve()`` is all that is sent, and the rest stays with the client."""
    steps_itself: ClassVar[bool] = False
    """Whether it takes steps itself, of plain SGD, by gradients that it asks for."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check(self, "strategy")

    @property
    def only_delta(self) -> bool:
        """Whether clients send the change of their weights and what is ``following`` it: a mean will do."""
        own = type(self).upload, type(self).arrived
        sums = own == (Strategy.upload, Strategy.arrived) and not self.personal
        return sums and (not self.trains or (self.apart and not self.confirms))

    @property
    def plain(self) -> bool:
        """Whether clients do nothing but the run's own steps, and send what these have changed alone."""
        kind = type(self)
        own = (getattr(kind, n) is not getattr(Strategy, n) for n in OF_CLIENTS)
        return not any(own) and not self.personal and not self.steps_itself

    @property
    def contrasts(self) -> bool:
        """Whether it changes what local steps take the gradient of."""
        return type(self).objective is not Strategy.objective

    @property
    def confirms(self) -> bool:
        """Whether clients remember something of what they sent."""
        return type(self).confirm is not Strategy.confirm

    @property
    def follows(self) -> bool:
        """Whether groups of its own follow from the change of the weights."""
        return type(self).following is not Strategy.following

    @property
    def trains(self) -> bool:
        """Whether a visit is more than one pass of local steps."""
        return type(self).train is not Strategy.train

    @property
    def asks(self) -> bool:
        """Whether what it sends hangs on losses or gradients that it asks of ``ctx.data``."""
        return False

    @property
    def needs_rates(self) -> bool:
        """Whether it computes with ``ctx.lr_sum``, which a scheduler of the user's own does not tell."""
        return False

    @property
    def keeps(self) -> bool:
        """Whether clients have a model of their own, or a part of one."""
        return bool(self.personal) or type(self).own is not Strategy.own

    @property
    def measures(self) -> bool:
        """Whether clients scale what they send, or send numbers beside it."""
        kind = type(self)
        return kind.scale is not Strategy.scale or kind.numbers is not Strategy.numbers

    def overshoots(self, lr: float) -> bool:
        """Whether steps of this learning rate go beyond what they aim at, whatever the data are."""
        return False

    def admits(self, linear: bool) -> str | None:
        """One sentence why it cannot do with such a run; None: it can.

        ``linear``: the server gets the very mean of what clients sent, not a median or a part of it.
        """
        return None if linear else self.needs_mean or None

    def prepare(self, model: nn.Module) -> "Strategy":
        """Freeze what is not to be trained, and return the strategy with what it must know of the model.

        Asked once by ``Server``, before anything else. Raises ConfigError where the model does not suit.
        """
        return self

    def thaw(self, model: nn.Module) -> None:
        """Let what ``prepare`` froze train again, in a model that a client fine-tunes for itself."""

    def rests(self, names: Iterable[str], extras: dict[str, Params]) -> set[str]:
        """Which of the trained weights a visit leaves frozen, by what the server broadcasts."""
        return set()

    def init(self, params: Params) -> dict[str, Params]:
        """Groups the server keeps and broadcasts beside the weights."""
        return {}

    def hold(self, params: Params) -> dict[str, Params]:
        """Groups that the server keeps for itself; ``step`` is given them among ``extras``."""
        return {}

    def remember(self, params: Params) -> dict[str, Params]:
        """A client's memory before its first visit; it never leaves the client."""
        return {}

    def train(self, solve: Solve, ctx: Context) -> tuple[Any, dict[str, Stack]]:
        """Local training: the result that is uploaded, and groups of the new memory, [K, ...]."""
        return solve(), {}

    def own(
        self, params: Params, memory: dict[str, Params], extras: Mapping[str, Params] = {}
    ) -> Params:
        """What a client uses for itself in place of the shared weights and buffers.

        ``extras``: the groups that the server broadcasts.
        """
        return memory.get("personal", {})

    def correction(self, ctx: Context) -> Correction:
        """What is added to each local step's gradient, after clipping and noise; asked once a visit."""
        return Correction()

    def correct(self, grads: Stack, params: Stack, ctx: Context) -> Stack:
        """The gradient each local step really uses, [K, ...], where ``correction`` cannot express it.

        It is given gradients with the correction added. A strategy that overrides it leaves the fast path.
        """
        return grads

    def objective(self, step: Step, ctx: Context) -> Step:
        """What one client's local steps take the gradient of, made of the recipe's own; asked once a visit.

        A strategy that overrides it trains client after client.
        """
        return step

    def upload(self, params: Stack, ctx: Context) -> tuple[dict[str, Stack], dict[str, Stack]]:
        """What is sent (``"delta"`` and own groups) and the new memory, each group [K, ...]."""
        return with_groups(tmap(torch.sub, params, ctx.anchor), self.following(ctx)), {}

    def following(self, ctx: Context) -> Following:
        """Groups of its own of which a sum will do, as an upload of its own takes each client's weights."""
        return {}

    def scale(self, ctx: Context, norms: Tensor) -> Tensor | None:
        """What each client's change is multiplied by before it is sent, [K]; None: nothing.

        ``norms``: length of each change, [K], float64. Unlike an upload of one's own it leaves a sum a sum.
        """
        return None

    def numbers(self, ctx: Context, norms: Tensor) -> dict[str, Tensor]:
        """Numbers that are averaged along, [K] each: ``step`` has their means in group ``"numbers"``.

        A round's record has the means too, ``strategy_NAME``.
        """
        return {}

    def confirm(
        self, sent: dict[str, Stack], memory: dict[str, Stack], ctx: Context
    ) -> dict[str, Stack]:
        """The new memory, [K, ...], after what was really sent: clipped, noised, and as it is decoded.

        ``memory``: what ``upload`` would have remembered.
        """
        return memory

    def arrived(self, sent: dict[str, Stack]) -> dict[str, Stack]:
        """On the server, before the mean: what is made of each client's own update, [K, ...].

        Only what needs no noise of the server's any more: client-level privacy refuses it.
        """
        return sent

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """Mean of what was sent -> the server's update and its new groups; share = cohort / all.

        ``extras``: the groups that are broadcast, and those that the server holds.

        An update may leave out weights, which stay, and move frozen ones, which travel from then on.
        """
        return mean["delta"], extras


def with_groups(delta: Stack, following: Following) -> dict[str, Stack]:
    """Changes [K, ...] and the groups that follow from them."""

    def made(d: Tensor, alike: Tensor, times: Tensor) -> Tensor:
        if len(times) == 1:  # in one pass
            return torch.add(alike, d, alpha=float(times))
        return (d * per_client(times, d)).add_(alike)

    groups = {
        g: tmap(partial(made, times=times), delta, alike) for g, (times, alike) in following.items()
    }
    return {"delta": delta, **groups}


@dataclass(frozen=True, kw_only=True)
class FedAvg(Strategy):
    """Weighted mean of the clients' weights (McMahan et al. 2017, arXiv:1602.05629, Alg. 1)."""
