"""What things are tried with, as two examples or numbers by chance, and words for what came of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedtorch.client import Client
from fedtorch.training.batches import fetch, len_of
from fedtorch.tree import mapped, rebuilt

SOME = 16
"""Examples by which it is found out if they are mixed."""


def two_examples(data: Dataset) -> Any:
    """A batch of two, or twice the only one."""
    # two examples even of a client that has one: BatchNorm cannot train on a single value
    return fetch(data, torch.tensor([0, len_of(data) - 1]))


def largest(clients: Sequence[Client]) -> Dataset:
    """The data of the client that has most."""
    # twice the only example of a small client would hide that examples are mixed
    return max(clients, key=len).data


def normal_inputs(scale: float, draw: torch.Generator, like: Tensor) -> Tensor:
    """Normal numbers in place of others of a model's input; whole ones, as of a vocabulary, stay."""
    if not like.is_floating_point():
        return like
    return torch.randn(like.shape, generator=draw).to(like) * scale


def inputs(fn: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """``fn`` of the inputs: of a pair the first part, of anything else all."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return rebuilt(batch, [mapped(fn, batch[0]), batch[1]])
    return mapped(fn, batch)


def shape(value: object) -> str:
    """A tensor by its shape, all else by its type."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def first(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
