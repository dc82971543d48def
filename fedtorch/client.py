"""Clients, and the recipe by which they train. ``training/local_update.py`` is what they do."""

from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedtorch.options import COUNT, POSITIVE, check, fit
from fedtorch.privacy import Nothing, Privacy
from fedtorch.strategies import FedAvg, Strategy
from fedtorch.training.batches import length
from fedtorch.training.losses import Loss, cross_entropy
from fedtorch.training.optimizer import ClientOptimizer
from fedtorch.types import ConfigError, Params


class Client:
    """One data owner: an id, data that stays here, and memory that never leaves.

    ``data`` is ``(x, y)`` tensors with one row for each example, or any map-style
    ``torch.utils.data.Dataset`` of ``(x, y)`` pairs. ``validation`` is held out of training.
    """

    def __init__(
        self,
        id: str,
        data: Dataset | tuple[Tensor, ...],
        validation: Dataset | tuple[Tensor, ...] | None = None,
    ) -> None:
        """Raises ConfigError when there is no data or its length is unknown."""
        self.id = str(fit("the id of a client, which comes before its data,", id, str | int))
        self.data = as_dataset(data, f"client {id!r}")
        self.validation = None if validation is None else as_dataset(validation, f"client {id!r}")
        self.memory: dict[str, Params] = {}

    def __len__(self) -> int:
        """Number of training examples."""
        return length(self.data)

    def __repr__(self) -> str:
        """Id and size, never data."""
        return f"Client({self.id!r}, {len(self)} examples)"


@dataclass(frozen=True)
class Recipe:
    """How every client trains in a visit, and how their work is combined."""

    strategy: Strategy = FedAvg()
    _: KW_ONLY
    loss: Loss = cross_entropy
    optimizer: ClientOptimizer = field(default_factory=ClientOptimizer)
    lr: float | None = None
    """Client learning rate before the schedule; none: 0.1, and 1 under sample-level privacy, where
    gradients are clipped."""
    epochs: int = 2
    """Passes over the client's data in one visit."""
    steps: int | None = None
    """Optimizer steps in one visit; given, it takes the place of epochs."""
    batch_size: int | None = 16
    """Examples in a local step; None: all of the client's at once."""
    drop_last: bool = False
    """Leave out the last, smaller batch of each pass (clients smaller than a batch keep theirs)."""
    privacy: Privacy = Nothing()
    """SampleLevel, ClientLevel or LocalDP; Nothing() or None: nothing is noised."""

    def __post_init__(self) -> None:
        """Refuse what cannot train, by name."""
        object.__setattr__(self, "privacy", self.privacy or Nothing())
        check(self, "", lr=POSITIVE, epochs=COUNT, steps=COUNT, batch_size=COUNT)
        self.optimizer.check()

    @property
    def learning_rate(self) -> float:
        """The learning rate, or the default that fits the kind of step."""
        return self.privacy.default_lr if self.lr is None else self.lr

    @property
    def weighting(self) -> str:
        """How clients are weighed: auto is by examples, and alike where privacy asks for it."""
        chosen = self.strategy.weighting
        return chosen if chosen != "auto" else self.privacy.weighting

    @property
    def needs_rows(self) -> bool:
        """Whether each client's own upload is needed, and not only the mean of what they learned."""
        return not (self.strategy.only_delta and self.privacy.scales)

    def weights(self, examples: Tensor) -> Tensor:
        """Aggregation weights of clients with so many examples, [K]."""
        return examples if self.weighting == "examples" else torch.ones_like(examples)


def as_dataset(data: Dataset | tuple[Tensor, ...], owner: str) -> Dataset:
    """Tensors or a map-style dataset -> a dataset of known, positive length."""
    if isinstance(data, (tuple, list)):
        if not all(isinstance(t, Tensor) and t.dim() for t in data):
            kinds = ", ".join(type(t).__name__ for t in data)
            arrays = "" if "ndarray" not in kinds else "; torch.from_numpy makes one of an array"
            raise ConfigError(
                f"{owner}: data must be tensors (x, y) with one row each, got {kinds}{arrays}"
            )
        sizes = [len(t) for t in data]
        if len(set(sizes)) != 1:
            raise ConfigError(f"{owner}: tensors of different lengths {sizes}")
        data = TensorDataset(*data)
    if type(data) is TensorDataset and any(t.requires_grad for t in data.tensors):
        if not all(t.is_leaf for t in data.tensors):
            raise ConfigError(
                f"{owner}: its data requires grad, and what it was computed from is not trained here: give "
                "x.detach()"
            )
        data = TensorDataset(*(t.detach() for t in data.tensors))  # nothing asks for its gradient
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ConfigError(
            f"{owner}: {type(data).__name__} is not map-style (it needs __len__ and __getitem__)"
        )
    if length(data) == 0:
        raise ConfigError(f"{owner} has no examples; leave it out")
    return data
