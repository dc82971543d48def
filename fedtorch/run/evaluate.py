"""How good a model is on data: a mean over examples, or a figure of all of them together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.client import Client
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.losses import Loss, counted, reduce
from fedtorch.training.module import channels_last, evaluating, load, snapshot
from fedtorch.training.stacked import forward, to
from fedtorch.tree import joined, size
from fedtorch.types import ConfigError, Params


def evaluate(
    model: nn.Module,
    data: Dataset,
    metrics: Mapping[str, Loss],
    batch_size: int | None = 512,
) -> dict[str, float]:
    """Each metric over ``data``, in eval mode; the model's mode is put back. No figures of no data.

    A metric that gives one number for each example is averaged over examples, whatever the batches are. One
    that gives a single number (F1, AUC, concordance), or says so by ``whole_set = True``, sees all outputs
    and targets at once. Raises ConfigError where a metric does neither, or fails on the whole set.
    """
    n = len_of(data)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    laid: bool | None = None
    means = {name: Mean() for name, m in metrics.items() if not getattr(m, "whole_set", False)}
    kept: list[tuple[Any, Any]] = []
    with evaluating(model), torch.no_grad(), seeds.seeded(0):
        for index in torch.arange(n).split(batch_size or max(n, 1)) if n else ():
            x, y = to(fetch(data, index), device)  # a copy: a model may write on what it is given
            if laid is None:
                laid = convolves(model, x)
            output = forward(model, channels_last(x) if laid else x)
            for name in [*means]:
                if not means[name].add(name, metrics[name], output, y, len(index)):
                    del means[name]
            if len(means) < len(metrics):
                kept.append((output, y))
        whole = {k: m for k, m in metrics.items() if k not in means}
        found = _of_all(whole, kept) if n else {}
    return {k: means[k].value() if k in means else found[k] for k in metrics} if n else {}


class Mean:
    """The mean of a metric over the examples of batches; positions that it ignores do not count."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.total, self.count = 0.0, 0.0

    def add(self, name: str, metric: Loss, output: Any, target: Any, size: int) -> bool:
        """Add a batch; False where the metric gives no number for each example, but one for all."""
        try:
            values = reduce(metric(output, target)).cpu().double()
        except ConfigError:
            raise
        except Exception:  # a score of classes, of a batch that has one alone: the whole set says
            values = torch.zeros(())
        if not values.dim() and not self.count:
            return False
        if values.shape != (size,):
            raise ConfigError(
                f"metric {name} must give one number for each example or one for all of them, got "
                f"{list(values.shape)} for {size} examples"
            )
        weight = counted(metric, target)
        self.total += (
            float(values.mean()) * size if weight is None else float(values @ weight.cpu().double())
        )
        self.count += size if weight is None else float(weight.sum())
        return True

    def value(self) -> float:
        """The mean so far; NaN where nothing counted."""
        return self.total / self.count if self.count else math.nan


def _of_all(metrics: Mapping[str, Loss], kept: list[tuple[Any, Any]]) -> dict[str, float]:
    if not metrics:
        return {}
    output, target = (
        kept[0] if len(kept) == 1 else [joined(parts) for parts in zip(*kept, strict=True)]
    )
    found = {}
    for name, metric in metrics.items():
        try:
            found[name] = float(reduce(metric(output, target)).cpu().double().mean())
        except ConfigError:
            raise
        except Exception as e:
            raise ConfigError(
                f"metric {name} fails on a set of {size(target)} examples: {type(e).__name__}: {e}"
            ) from e
    return found


def convolves(model: nn.Module, x: Any) -> bool:
    """Whether these are images that the model takes in channels-last memory, tried on two of them."""
    if not (isinstance(x, Tensor) and x.dim() == 4 and x.device.type == "cpu"):
        return False
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return False
    try:
        few = [x[:2].clone(), x[:2].clone()]  # a model may write on what it is given
        wanted, got = forward(model, few[0]), forward(model, channels_last(few[1]))
    except RuntimeError:  # a view of what is no longer one block of memory
        return False
    return isinstance(got, Tensor) and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def evaluate_clients(
    model: nn.Module,
    clients: Sequence[Client],
    metrics: Mapping[str, Loss],
    own: Mapping[str, Params] | None = None,
) -> dict[str, dict[str, float]]:
    """The global model on each client's own validation data, by client id.

    ``own``: what clients keep (``Server.own``); each is judged with its own in place.
    """
    found, before = {}, snapshot(model) if own else {}
    for client in clients:
        if client.validation is not None:
            if own:
                load(model, before | own.get(client.id, {}))
            found[client.id] = evaluate(model, client.validation, metrics)
    if own:
        load(model, before)
    return found
