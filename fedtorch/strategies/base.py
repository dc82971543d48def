"""A strategy is a frozen dataclass of hyper-parameters with pure methods; every default is FedAvg."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import nn

from fedtorch.options import check
from fedtorch.training.optimizer import ServerOptimizer
from fedtorch.tree import expand, row, tmap
from fedtorch.types import Context, Params, Stack


class Correction(NamedTuple):
    """What is added to every gradient of a visit: ``pull (w - anchor) + shift``, linear in the weights."""

    pull: float = 0.0
    """How strongly the weights are drawn back to where the visit started."""
    shift: Stack | None = None
    """By the weights' names, [K, ...] or, for all clients alike, [1, ...]; none: a weight left out."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What a federated algorithm decides, on the client and on the server.

    Override the methods that differ; a method never stores to ``self``. Client methods see K clients
    at once: everything that varies per client has a leading axis.
    """

    server: ServerOptimizer | None = None
    """Server optimizer fed with the mean delta; none: the mean delta is simply added."""
    weighting: Literal["auto", "examples", "uniform"] = "auto"
    """Average clients by their number of examples, or all alike; auto: by examples, under privacy alike."""
    personal: tuple[str, ...] = ()
    """Weights and buffers that stay with each client, by name ("head.*") or kind of layer ("@BatchNorm"):
    they are in its memory, in no task, upload or mean, and in nothing that the methods below are given."""

    needs_rates: ClassVar[bool] = False
    """Whether it computes with ``ctx.lr_sum``, which a scheduler of the user's own does not tell."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check(self, "strategy")

    @property
    def only_delta(self) -> bool:
        """Whether clients send the change of their weights and no more, of which the mean will do."""
        own = type(self).upload, type(self).arrived
        return own == (Strategy.upload, Strategy.arrived) and not self.personal

    def admits(self, linear: bool) -> str | None:
        """One sentence why it cannot do with such a run; None: it can.

        ``linear``: the server gets the very mean of what clients sent, not a median or a part of it.
        """
        return None

    def prepare(self, model: nn.Module) -> "Strategy":
        """Freeze what is not to be trained, and return the strategy with what it must know of the model.

        Asked once by ``Server``, before anything else. Raises ConfigError where the model does not suit.
        """
        return self

    def rests(self, names: Iterable[str], extras: dict[str, Params]) -> set[str]:
        """Which of the trained weights a visit leaves frozen, by what the server broadcasts."""
        return set()

    def init(self, params: Params) -> dict[str, Params]:
        """Groups the server keeps and broadcasts beside the weights."""
        return {}

    def remember(self, params: Params) -> dict[str, Params]:
        """A client's memory before its first visit; it never leaves the client."""
        return {}

    def correction(self, ctx: Context) -> Correction:
        """What is added to each local step's gradient, after clipping and noise; asked once a visit."""
        return Correction()

    def correct(self, grads: Stack, params: Stack, ctx: Context) -> Stack:
        """The gradient each local step really uses, [K, ...], where ``correction`` cannot express it.

        It is given gradients with the correction added. A strategy that overrides it leaves the fast path.
        """
        return grads

    def upload(self, params: Stack, ctx: Context) -> tuple[dict[str, Stack], dict[str, Stack]]:
        """What is sent (``"delta"`` and own groups) and the new memory, each group [K, ...]."""
        return {"delta": tmap(torch.sub, params, ctx.anchor)}, {}

    def arrived(self, sent: dict[str, Stack]) -> dict[str, Stack]:
        """On the server, before the mean: what is made of each client's own update, [K, ...].

        Only what needs no noise of the server's any more: client-level privacy refuses it.
        """
        return sent

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """Mean of what was sent -> the server's update and its new groups; share = cohort / all.

        An update may leave out weights, which stay, and move frozen ones, which travel from then on.
        """
        return mean["delta"], extras


@dataclass(frozen=True, kw_only=True)
class FedAvg(Strategy):
    """Weighted mean of the clients' weights (McMahan et al. 2017, arXiv:1602.05629, Alg. 1)."""


def uploads(strategy: Strategy, params: Params, extras: dict[str, Params]) -> dict[str, Params]:
    """What a client sends, in names and shapes: an upload of a visit that changed nothing."""
    own = {g: expand(m) for g, m in strategy.remember(params).items()}
    shared = {g: expand(e) for g, e in extras.items()}
    ctx = Context(expand(params), shared, own, torch.ones(1), 1.0, (0,))
    return {g: row(s, 0) for g, s in strategy.upload(expand(params), ctx)[0].items()}
