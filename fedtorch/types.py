"""What crosses each boundary: server -> client, client -> server, and nothing else."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""One model: name -> [...]."""

Stack = dict[str, Tensor]
"""K models: name -> [K, ...]. The leading axis is the client, always, even when K = 1."""

Frozen = TypeVar("Frozen")

NUMBERS = "numbers"
"""The group of what is sent that has a strategy's numbers, one for each client."""

AUDIT = "audit"
"""The group of a client's memory that has canaries of an audit, which no strategy knows of."""

TOLD = "told"
"""The group in which a client sends what a plan's own figures are made of, clipped and noised."""

BUFFERS = "buffers"
"""The group in which a rule sees the changes of float buffers, which are as open to a liar as weights."""

CLIP_BIT = "below"
"""Group in which a client says whether its norm was below the clipping norm (adaptive clipping)."""


class ConfigError(ValueError):
    """Something the user asked for cannot be done; the message names it and the fix."""


class ClientError(RuntimeError):
    """A client's own code (its dataset, the model, the loss) raised; the message says whose."""


class OverBudget(RuntimeError):
    """What was asked would cost a site's data more than the site allows; nothing of it has left."""


class ClaimRefuted(RuntimeError):
    """An audit has found what contradicts a run's privacy claim; the message says what."""


class NothingLearned(RuntimeError):
    """A run is over and its model is the one that it started from."""


def altered(made: Frozen, **fields: Any) -> Frozen:
    """``dataclasses.replace`` without its checks, which cost more than the rest of a visit's start."""
    found = object.__new__(type(made))
    vars(found).update(vars(made), **fields)
    return found


@dataclass(frozen=True)
class Task:
    """Everything the server sends to a client for one round."""

    state: Params
    """Of the global model: what is trained, and what else is no longer as clients were given it."""
    extras: dict[str, Params]
    """What else the strategy broadcasts, by group (SCAFFOLD: ``{"c": ...}``)."""
    round: int
    seed: int
    lr: float
    """Client learning rate of this round, after the schedule."""
    privacy: dict[str, float] = field(default_factory=dict)
    """Public numbers of the privacy plan this round: ``clip`` (norm) and ``noise`` (multiplier)."""
    visit: int = 0
    """How many visits the client has made to this very model before."""

    @property
    def draw(self) -> tuple[int, ...]:
        """What every draw of the visit is made from, beside the client: no two visits share one."""
        return (self.round, self.visit) if self.visit else (self.round,)

    def exact(self, names: Sequence[str]) -> Params:
        """These of the state in float64, each converted once for all clients of the round."""
        for k in names:
            if k not in self._exact:
                self._exact[k] = self.state[k].double()
        return {k: self._exact[k] for k in names}

    @cached_property
    def _exact(self) -> Params:
        return {}

    def filled(self, own: Params) -> "Task":
        """With every parameter and buffer: what did not travel is as in ``own``, the model as given."""
        return replace(self, state={k: self.state.get(k, v) for k, v in own.items()})


@dataclass(frozen=True)
class Tasks:
    """What the clients of one call were sent: each has one of these."""

    each: tuple[Task, ...]
    factors: tuple[float, ...]
    """What changes count by, of each."""

    @property
    def round(self) -> int:
        """Of the latest."""
        return max(task.round for task in self.each)

    def filled(self, own: Params) -> "Tasks":
        """As of a task."""
        return replace(self, each=tuple(task.filled(own) for task in self.each))


class Data(Protocol):
    """What a strategy may ask of each client's data beside the local steps; nothing noises the answers."""

    def loss(self, at: Stack | None = None) -> Tensor:
        """Mean loss over all of a client's examples, in evaluation mode, [K], float64, on the CPU.

        ``at``: weights, [K, ...] or [1, ...]; none: those that the visit starts from.
        """

    def grad(self, at: Stack | None = None, step: int | None = None) -> tuple[Stack, Tensor]:
        """The gradient of the mean loss by the weights of ``at``, [K, ...], and that loss, [K].

        In training mode, of the examples of one local step of the visit; none: of all. Both are zero where
        a client has no such step.
        """

    def among(self, places: Sequence[int]) -> "Data":
        """Of these clients alone."""


class Untold:
    """``Data`` where nobody may look at them."""

    def loss(self, at: Stack | None = None) -> Tensor:
        """Raises ConfigError."""
        raise ConfigError(UNTOLD)

    def grad(self, at: Stack | None = None, step: int | None = None) -> tuple[Stack, Tensor]:
        """Raises ConfigError."""
        raise ConfigError(UNTOLD)

    def among(self, places: Sequence[int]) -> "Untold":
        """Nor at these."""
        return self


UNTOLD = (
    "a strategy asks for losses or gradients of clients' data (ctx.data) where they may not be had: under "
    "sample-level privacy only train may ask, and only for what stays with the client"
)


@dataclass(frozen=True)
class Context:
    """What a strategy may look at on the client. Shared tensors have a leading axis of 1."""

    anchor: Stack
    """Trainable weights the visit started from, [1, ...]; not the clients' personal ones."""
    extras: dict[str, Stack]
    """The strategy's broadcast groups, each [1, ...]."""
    memory: dict[str, Stack]
    """The clients' own memory groups, each [K, ...]."""
    steps: Tensor
    """Optimizer steps of each client in this visit, [K]."""
    lr: float
    seeds: Sequence[int] = ()
    """What a strategy may draw from for each client in this visit, [K]; never a client's secret."""
    own: Stack = field(default_factory=dict)
    """Weights and buffers that each client keeps, as its visit starts from them, [K, ...]."""
    lr_sum: Tensor = field(default=torch.empty(0))
    """Learning rates of each client's steps, summed, [K]: steps times lr, but where it changes within a
    visit; NaN under a scheduler of one's own."""

    reach: Callable[[float], Tensor] | None = None
    """With a pull: how far each client's SGD goes in its steps where every gradient is 1, over lr, [K];
    none: as far as it has steps."""

    data: Data = field(default_factory=Untold)
    """What may be asked of the clients' data: nothing under sample-level privacy, but in ``train``."""

    def __post_init__(self) -> None:
        """Unless told otherwise, all steps are alike."""
        if not len(self.lr_sum):
            object.__setattr__(self, "lr_sum", self.steps.double() * self.lr)

    def of(self, k: int) -> "Context":
        """Client ``k`` alone, as K = 1."""
        return self.among([k])

    def among(self, places: Sequence[int]) -> "Context":
        """These clients alone."""
        at = slice(places[0], places[0] + 1) if len(places) == 1 else [*places]
        memory = {g: {name: v[at] for name, v in m.items()} for g, m in self.memory.items()}
        steps, lr_sum, whole = self.steps[at], self.lr_sum[at], self.reach
        return altered(
            self,
            memory=memory,
            steps=steps,
            lr_sum=lr_sum,
            seeds=tuple([self.seeds[k] for k in places]),
            reach=whole and (lambda pull: whole(pull)[at]),
            data=self.data.among(places),
        )


_SEAL = object()
"""Whoever has it may make a ``Released``: ``Privacy.release``, and whoever reads one out of a message."""


@dataclass(frozen=True)
class Released:
    """What K clients send: the only thing of theirs that reaches another process.

    ``Privacy.release`` makes it of what visits left; nobody else can, and nobody can exchange a part of it.
    Sent tensors are float64, so that a sum loses nothing; a sum that the fast path took in the weights' own
    type is of that type. Raises TypeError where anybody else makes one.
    """

    ids: tuple[str, ...]
    sent: dict[str, Stack]
    """``"delta"`` (weights minus anchor) and the strategy's own groups, each [K, ...]."""
    buffers: Stack
    """Float buffers (BatchNorm statistics) after the visit, [K, ...]."""
    weight: Tensor
    """Aggregation weight, [K]."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Figures about the visit, each [K]; never about single examples."""
    summed: bool = False
    """``sent`` and ``buffers`` are one row, the weighted mean of the K clients: a strategy that only
    averages deltas never needs them one by one, and K copies of a model are slow to write and read."""
    seal: InitVar[object] = None

    def __post_init__(self, seal: object) -> None:
        """Nothing leaves a client past its plan; ``dataclasses.replace`` has no seal to give."""
        if seal is not _SEAL:
            raise TypeError(
                "only Privacy.release makes what a client may send (fedtorch.types.Released)"
            )

    @classmethod
    def received(
        cls,
        ids: tuple[str, ...],
        sent: dict[str, Stack],
        buffers: Stack,
        weight: Tensor,
        metrics: dict[str, Tensor] | None = None,
        summed: bool = False,
    ) -> "Released":
        """What came in a message: it was released where it was sent from."""
        return cls(ids, sent, buffers, weight, metrics or {}, summed, _SEAL)

    def scaled(self, factor: float) -> "Released":
        """The same with every number sent multiplied by ``factor``; buffers are as they are."""
        return self.mapped(lambda _, s: {k: v * factor for k, v in s.items()}, self.sent)

    def mapped(self, change: Callable[[str, Stack], Stack], groups: Iterable[str]) -> "Released":
        """The same with these groups of what is sent as ``change`` makes them."""
        return self.beside({g: change(g, self.sent[g]) for g in groups})

    def beside(self, groups: dict[str, Stack], floats: Stack | None = None) -> "Released":
        """The same with these groups, which are made of what was sent, in it, and so of the buffers."""
        buffers = self.buffers | (floats or {})
        return replace(self, sent=self.sent | groups, buffers=buffers, seal=_SEAL)


@dataclass(frozen=True)
class Raw:
    """What K visits left, before the privacy plan: it stays in the process that holds the data."""

    ids: tuple[str, ...]
    examples: Tensor
    """Of each client, [K]."""
    weight: Tensor
    """Aggregation weight, [K]."""
    figures: dict[str, Tensor]
    """Figures about the visits, each [K]."""
    results: Any
    """``fedtorch.training.results.Results``."""
    groups: dict[str, Stack] | None
    """What the strategy would send, each [K, ...]; None: the mean of the changes is all that is needed."""
    settled: Tensor | None
    """Whether float buffers and what is personal are finite or as they were, [K]; None: nothing to ask."""
    personal: frozenset[str] = frozenset()
    """Names that stay with the client."""
    measured: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] | None = None
    """From the lengths of the changes: what each is multiplied by, and numbers that go along, [K] each."""
    following: dict[str, tuple[Tensor, Stack]] = field(default_factory=dict)
    """Where only a mean is needed: groups that are so many times the change, and what all add to it."""
    told: tuple[Tensor, ...] = ()
    """Of every example of each client what the plan's own figures are made of, [n, 3]; or none are due."""


@dataclass(frozen=True)
class Failure:
    """A client that has no usable update this round."""

    id: str
    kind: str
    """``nonfinite`` or ``dropped``."""
    reason: str
