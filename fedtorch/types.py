"""What crosses each boundary: server -> client, client -> server, and nothing else."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

Params = dict[str, Tensor]
"""One model: name -> [...]."""

Stack = dict[str, Tensor]
"""K models: name -> [K, ...]. The leading axis is the client, always, even when K = 1."""


class ConfigError(ValueError):
    """Something the user asked for cannot be done; the message names it and the fix."""


class ClientError(RuntimeError):
    """A client's own code (its dataset, the model, the loss) raised; the message says whose."""


class NothingLearned(RuntimeError):
    """A run is over and its model is the one that it started from."""


@dataclass(frozen=True)
class Task:
    """Everything the server sends to a client for one round."""

    state: Params
    """Every parameter and buffer of the global model."""
    extras: dict[str, Params]
    """What else the strategy broadcasts, by group (SCAFFOLD: ``{"c": ...}``)."""
    round: int
    seed: int
    lr: float
    """Client learning rate of this round, after the schedule."""
    privacy: dict[str, float] = field(default_factory=dict)
    """Public numbers of the privacy plan this round: ``clip`` (norm) and ``noise`` (multiplier)."""

    @cached_property
    def exact(self) -> Params:
        """The state in float64, converted once for all clients of the round; not what is complex."""
        return {k: v if v.is_complex() else v.double() for k, v in self.state.items()}


@dataclass(frozen=True)
class Context:
    """What a strategy may look at on the client. Shared tensors have a leading axis of 1."""

    anchor: Stack
    """Trainable weights the visit started from, [1, ...]."""
    extras: dict[str, Stack]
    """The strategy's broadcast groups, each [1, ...]."""
    memory: dict[str, Stack]
    """The clients' own memory groups, each [K, ...]."""
    steps: Tensor
    """Optimizer steps of each client in this visit, [K]."""
    lr: float
    seeds: tuple[int, ...] = ()
    """Of each client's own draws in this visit, such as dropout's, [K]; empty where nothing can draw."""
    own: tuple[int, ...] | None = None
    """What a strategy is shown for ``seeds`` where those are a secret of the clients."""

    def shown(self) -> "Context":
        """What a strategy may look at: never a client's secret."""
        return self if self.own is None else replace(self, seeds=self.own, own=None)


@dataclass(frozen=True)
class Update:
    """What K clients send back.

    Sent tensors are float64, so that a sum loses nothing; of a sum that the fast path took in the weights'
    own type they are of that type.
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


@dataclass(frozen=True)
class Failure:
    """A client that has no usable update this round."""

    id: str
    kind: str
    """``nonfinite`` or ``dropped``."""
    reason: str
