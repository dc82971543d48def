"""Clients: data that stays with its owner. ``training/local_update.py`` is what they do with it."""

from collections.abc import Sized
from typing import cast

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedtorch.options import fit
from fedtorch.training.batches import len_of
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
        return len(cast(Sized, self.data))

    def __repr__(self) -> str:
        """Id and size, never data."""
        return f"Client({self.id!r}, {len(self)} examples)"


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
    if len_of(data) == 0:
        raise ConfigError(f"{owner} has no examples; leave it out")
    return data
