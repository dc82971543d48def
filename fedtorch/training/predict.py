"""What a model gives for inputs whose targets nobody knows."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fedtorch import seeds
from fedtorch.options import COUNT, fit, within
from fedtorch.training.batches import in_order
from fedtorch.training.datasets import as_dataset
from fedtorch.training.module import evaluating, other_types
from fedtorch.training.stacked import forward, to
from fedtorch.training.step import pair
from fedtorch.tree import joined
from fedtorch.types import ConfigError

CPU = torch.device("cpu")


def predict(model: nn.Module, x: Any, batch_size: int = 512) -> Any:
    """The model's outputs for ``x``, in eval mode and on the CPU, a row for each example.

    ``x``: a tensor, array or DataFrame of inputs, or a dict of such for a model that takes one; or data as
    a client takes them, ``(x, y)`` or a dataset of pairs, whose targets are not looked at. The outputs are
    the model's own, such as logits. Raises ConfigError where the model cannot take them.
    """
    within("batch_size", fit("batch_size", batch_size, int), COUNT)
    pairs = isinstance(x, Dataset | DataLoader | tuple) or hasattr(x, "column_names")
    data = as_dataset(x if pairs else (x,), "the inputs to predict")
    device = next((p.device for p in model.parameters()), CPU)
    found = []
    with evaluating(model), torch.no_grad(), seeds.seeded(0):
        for _, batch in in_order(data, batch_size):
            given = to(pair(batch)[0] if pairs else batch[0], device)
            try:
                found.append(to(forward(model, given), CPU))
            except (RuntimeError, IndexError, TypeError, ValueError) as e:
                why = f"{str(e).partition(chr(10))[0]}{other_types(model, (given, given))}"
                name = type(model).__name__
                raise ConfigError(f"model {name} cannot take the inputs to predict: {why}") from e
    return joined(found)
