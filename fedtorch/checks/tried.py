"""Two examples to try things with, and words for what came of it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedtorch.training.batches import fetch, len_of


def two_examples(data: Dataset) -> Any:
    """A batch of two, or twice the only one."""
    # two examples even of a client that has one: BatchNorm cannot train on a single value
    return fetch(data, torch.tensor([0, len_of(data) - 1]))


def shape(value: object) -> str:
    """A tensor by its shape, all else by its type."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def first(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
