"""Whether what a model gives in evaluation fits the classes of the data, and each metric."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import Dataset, TensorDataset

from fedtorch import seeds
from fedtorch.checks.tried import first, shape
from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.losses import IGNORED, Loss, cross_entropy, gathers, reduce
from fedtorch.training.module import forward, to
from fedtorch.training.outline import untouched
from fedtorch.types import ConfigError

CLASSES = nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss
"""Losses of torch whose targets are classes."""


def classes_fit(
    model: nn.Module, train: Dataset, labels: Tensor | None, classes: int, column: str = ""
) -> None:
    """A classifier needs an output for every label there is (a batch may miss the largest one)."""
    if classes < 2:
        what = f"the target, column {column!r}," if column else "every target"
        raise ConfigError(
            f"{what} is of one class, so that there is nothing to learn: add examples of another"
        )
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ConfigError(
            f"the data names {classes} classes, but its labels go from {int(labels.min())} to "
            f"{int(labels.max())}: they must be 0 to {classes - 1}"
        )
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        return
    try:
        with _output(model, train) as (output, _):
            found = output
    except Exception:  # the trial of training says what is wrong with a model that does not run
        return
    if isinstance(found, Tensor) and (found.dim() < 2 or found.shape[1] < classes):
        raise ConfigError(
            f"model {type(model).__name__} gives {shape(found)} for a batch of {len(found)}, but the data "
            f"has {classes} classes: it needs an output of {classes} for each example, on axis 1"
        )


def labels_fit(
    model: nn.Module, clients: Sequence[Client], tried: Sequence[Client], recipe: Recipe
) -> None:
    """A label that is none of the model's classes would end the run where a batch holds it.

    Looked for where targets are a table of classes and the loss is torch's or ours; ``tried`` stand for the
    clients in all else.
    """
    ours = recipe.loss is cross_entropy or isinstance(recipe.loss, CLASSES)
    if recipe.step is not None or recipe.local is not None or not ours:
        return
    with _output(model, tried[0].data) as (output, _):
        classes = output.shape[1] if isinstance(output, Tensor) and output.dim() > 1 else 0
    ignored = getattr(recipe.loss, "ignore_index", IGNORED)
    for client in clients if classes else ():
        tables = client.data.tensors if isinstance(client.data, TensorDataset) else ()
        if len(tables) != 2 or tables[1].is_floating_point():
            continue
        low, high = (int(v) for v in tables[1].aminmax())
        if (low < 0 or high >= classes) and bool(
            ((tables[1] < 0) | (tables[1] >= classes)).logical_and(tables[1] != ignored).any()
        ):
            raise ConfigError(
                f"client {client.id} has labels that are none of the model's {classes} classes, 0 to "
                f"{classes - 1}: number them from 0, or give the model as many outputs as there are"
            )


def metrics_fit(model: nn.Module, data: Dataset, metrics: Mapping[str, Loss]) -> dict[str, Loss]:
    """Each metric must give a number for each example of a few, or one number for them all.

    Returns those that only the whole set can try: they give one number, or fail on a few (a score of
    classes, of examples that are all of one class).
    """
    # those by name know of sets what one batch cannot have, those of others may not
    gathering = {k: m for k, m in metrics.items() if gathers(m)}
    named = {k for k, m in gathering.items() if hasattr(m, "whole_set")}
    whole = {k: m for k, m in gathering.items() if k not in named}
    if not len_of(data):
        return {}
    for few in {min(2, len_of(data)), min(3, len_of(data))}:
        with _output(model, data, few) as (output, y):
            for name, metric in metrics.items():
                if name in gathering and name not in named:
                    continue
                try:
                    value = reduce(metric(output, y)).cpu().double()
                except ConfigError:
                    raise
                except Exception as e:
                    if len_of(data) > few and getattr(metric, "whole_set", True):
                        whole[name] = metric
                        continue
                    raise ConfigError(
                        f"metric {name} does not fit the output {shape(output)} and the labels "
                        f"{shape(y)}: {first(e)}"
                    ) from e
                if value.dim() and value.shape != (few,):
                    raise ConfigError(
                        f"metric {name} must give one number for each example or one for all of them, got "
                        f"{shape(value)} for {few} examples"
                    )
                if not value.dim() and name not in named:
                    whole[name] = metric
    return whole


@contextmanager
def _output(model: nn.Module, data: Dataset, few: int = 2) -> Iterator[tuple[Any, Any]]:
    """What the model gives for a few examples in evaluation, and their labels; it is left as it was."""
    x, y = to(fetch(data, torch.arange(min(few, len_of(data)))), next(model.parameters()).device)
    with untouched(model), torch.no_grad(), seeds.seeded(0):
        try:
            output = forward(model.eval(), x)
        except Exception as e:
            raise ConfigError(
                f"model {type(model).__name__} cannot take a batch {shape(x)} in evaluation: {first(e)}"
            ) from e
        yield output, y
