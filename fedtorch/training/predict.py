"""What a model gives for inputs whose targets nobody knows."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fedtorch import seeds
from fedtorch.options import COUNT, fit, within
from fedtorch.training.batches import fetch, in_order, len_of
from fedtorch.training.datasets import as_dataset
from fedtorch.training.module import CPU, evaluating, forward, other_types, to
from fedtorch.training.step import pair
from fedtorch.tree import joined
from fedtorch.types import ConfigError


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


def guesses(model: nn.Module, test: Any, most: int = 10_000) -> tuple[Tensor, Tensor, int] | None:
    """True and predicted classes of the first ``most`` pairs (x, y) of a dataset, and how many there are.

    The predicted class is the largest output, or of one output whether it is above 0. None where the model
    gives no single tensor.
    """
    device = next((p.device for p in model.parameters()), CPU)
    found, classes = [], 2
    with evaluating(model), torch.no_grad(), seeds.seeded(0):
        for index in torch.arange(min(len_of(test), most)).split(512):
            x, y = fetch(test, index)
            output = forward(model, to(x, device))
            if not isinstance(output, Tensor) or not output.dim():
                return None
            columns = output.shape[1] if output.dim() > 1 else 1
            classes = max(columns, 2)
            guess = output.argmax(1) if columns > 1 else (output.flatten() > 0).long()
            found.append((y.cpu() if columns > 1 else y.cpu().flatten(), guess.cpu()))
    true, predicted = (torch.cat(parts) for parts in zip(*found, strict=True))
    return true, predicted, classes


def confusion(model: nn.Module, test: Any, kind: str) -> Tensor | None:
    """How many test examples of each class (rows) are taken for which (columns), [C, C].

    ``kind``: classification or binary. None of data of another kind, that are no pairs (x, y), or that have
    a class for each position, as texts do.
    """
    test = as_dataset(test, "the test data", empty=True)
    if kind not in ("classification", "binary") or not len_of(test):
        return None
    batch = fetch(test, torch.arange(1))
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        return None
    found = guesses(model, test)
    if found is None or found[0].shape != found[1].shape or found[0].dim() != 1:
        return None
    true, predicted, classes = found[0].long(), *found[1:]
    if int(true.min()) < 0 or int(true.max()) >= classes:
        return None
    return torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, -1)
