"""How good a model is on data: a mean over examples, or a figure of all of them together."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.client import Client
from fedtorch.options import COUNT, within
from fedtorch.training.batches import in_order, len_of
from fedtorch.training.datasets import as_dataset
from fedtorch.training.losses import Loss, counted, gathers, reduce
from fedtorch.training.metrics import by_name
from fedtorch.training.module import (
    CPU,
    channels_last,
    evaluating,
    forward,
    groups,
    load,
    other_types,
    snapshot,
    to,
)
from fedtorch.training.step import pair
from fedtorch.tree import joined, size
from fedtorch.types import ConfigError, Params

Judge = Callable[[nn.Module, Any], Any]
"""``step(model, batch)`` -> (output, target), or figures by name: [B] each, or the mean of the batch."""


def evaluate(
    model: nn.Module,
    data: Any,
    metrics: Mapping[str, Loss | str] | Sequence[str] = (),
    batch_size: int | None = 512,
    *,
    step: Judge | None = None,
) -> dict[str, float]:
    """Each metric over ``data``, in eval mode; the model's mode is put back. No figures of no data.

    ``metrics``: names (``["accuracy", "auroc"]``; a wrong one is told the list), or functions by what to
    call them. One that gives a number for each example is averaged over examples, whatever the batches are.
    One that gives a single number (F1, AUC, concordance), or says so by ``whole_set = True``, sees all
    outputs and targets at once. One with ``reset``, ``update`` and ``compute``, as torchmetrics' have, is
    copied and takes in batch after batch. NaN: the data have no such figure.

    ``step(model, batch)`` is for batches that are not (x, y), or a model that is not called so: it returns
    the output and the target that metrics get, or by name figures of its own, each a number for each
    example or the mean of the batch. Raises ConfigError where a metric or figure does none of these.
    """
    # what is judged, and by what: batch by batch, by totals, or by all outputs at once
    data = as_dataset(data, "the data to evaluate on", empty=True)
    n, metrics = len_of(data), by_name(metrics)
    within("batch_size", 1 if batch_size is None else batch_size, COUNT)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    judged, figures = _Judged(model, step, bool(metrics)), dict[str, Mean]()
    running = {name: _fresh(m) for name, m in metrics.items() if gathers(m)}
    means = {
        k: Mean()
        for k, m in metrics.items()
        if k not in running and not getattr(m, "whole_set", False)
    }
    kept: list[tuple[Any, Any]] = []
    # batch by batch
    with evaluating(model), torch.no_grad(), seeds.seeded(0):
        for index, batch in in_order(data, batch_size or n) if n else ():
            try:
                given = judged(to(batch, device))
            except RuntimeError as e:
                fix = other_types(model, batch)
                if fix or (int(index[0]) == 0 and not isinstance(e, torch.OutOfMemoryError)):
                    raise ConfigError(
                        f"model {type(model).__name__} fails on the data: {e}{fix}"
                    ) from e
                raise
            if isinstance(given, Mapping):
                _add(figures, given, len(index), metrics)
                continue
            output, y = given
            for name in [*means]:
                if not means[name].add(name, metrics[name], output, y, len(index)):
                    del means[name]
            for name, metric in running.items():
                _try(name, len(index), metric.update, output, y)
            if len(means) + len(running) < len(metrics):
                # a whole set may be more than an accelerator holds
                kept.append(to((output, y), CPU))
        # what needs all of them
        whole = {k: m for k, m in metrics.items() if k not in means and k not in running}
        found = _of_all(whole, kept, device) if n else {}
        found |= {k: float(_number(k, _try(k, n, m.compute))) for k, m in running.items() if n}
    if figures:
        return {k: m.value() for k, m in figures.items()}
    return {k: means[k].value() if k in means else found[k] for k in metrics} if n else {}


NO_METRICS = (
    "evaluate has nothing to judge by: give metrics=['accuracy'], or a function by what to call it, "
    "{'loss': nn.functional.cross_entropy}, or a step that returns figures by name"
)


LOSS_HERE = (
    "; evaluated, the model gives {}: where that is not what it gives in training, let the loss take both, "
    "or judge by another, metrics={{'loss': fn}}"
)


class MetricFailed(ConfigError):
    """A metric cannot take a whole set."""

    def __init__(self, name: str, n: int, error: Exception) -> None:
        """``name``: the metric's; ``n``: examples of the set."""
        super().__init__(
            f"metric {name} fails on a set of {n} examples: {type(error).__name__}: {error}"
        )
        self.name = name


class _Judged:
    """What a batch is judged by: a pair of output and target, or figures."""

    def __init__(self, model: nn.Module, step: Judge | None, metrics: bool) -> None:
        self.model, self.step, self.metrics = model, step, metrics
        self.laid: bool | None = None

    def __call__(self, batch: Any) -> Any:
        """Of a batch that is a copy, as a model may write on what it is given."""
        if self.step is not None:
            found = self.step(self.model, batch)
            if isinstance(found, Mapping):
                return found
            if isinstance(found, (tuple, list)) and len(found) == 2:
                return self._judges(found)
            raise ConfigError(
                "a step of an evaluation must return (output, target) for the metrics, or figures by name, "
                f"not a {type(found).__name__}"
            )
        x, y = pair(batch)
        if self.laid is None:
            self.laid = convolves(self.model, x)
        return self._judges((forward(self.model, channels_last(x) if self.laid else x), y))

    def _judges(self, both: Any) -> Any:
        if not self.metrics:
            raise ConfigError(NO_METRICS)
        return both


def _add(
    means: dict[str, "Mean"], figures: Mapping[str, Any], n: int, metrics: Mapping[str, Loss]
) -> None:
    """A step's own figures of a batch of n examples."""
    if metrics:
        raise ConfigError(
            f"the step returns figures ({', '.join(figures)}), so that metric {next(iter(metrics))} has no "
            "output to judge: return (output, target), or leave the metrics out"
        )
    for name, value in figures.items():
        each = torch.as_tensor(value)
        means.setdefault(name, Mean()).add(
            name, lambda v, _: v, each if each.dim() else each.expand(n), each, n
        )


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


def _fresh(metric: Any) -> Any:
    metric = copy.deepcopy(metric)
    metric.reset()
    return metric


def _number(name: str, value: Any) -> Tensor:
    if not isinstance(value, (Tensor, int, float)) or torch.as_tensor(value).numel() != 1:
        kind = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"metric {name} must give one number for all examples, got {kind}")
    return torch.as_tensor(value)


def _of_all(
    metrics: Mapping[str, Loss], kept: list[tuple[Any, Any]], device: torch.device
) -> dict[str, float]:
    if not metrics:
        return {}
    parts = kept[0] if len(kept) == 1 else [joined(p) for p in zip(*kept, strict=True)]
    output, target = to(tuple(parts), device)  # where a metric's own tensors are
    n = size(target)
    try:
        return {
            k: float(_try(k, n, lambda m=m: reduce(m(output, target)).cpu().double().mean()))
            for k, m in metrics.items()
        }
    except MetricFailed as e:
        if e.name == "loss":
            given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            e.args = (f"{e}{LOSS_HERE.format(given)}",)
        raise


def _try(name: str, n: int, act: Callable[..., Any], *args: Any) -> Any:
    try:
        return act(*args)
    except ConfigError:
        raise
    except Exception as e:
        raise MetricFailed(name, n, e) from e


def convolves(model: nn.Module, x: Any) -> bool:
    """Whether these are images that the model takes in channels-last memory, tried on two of them."""
    if not (isinstance(x, Tensor) and x.dim() == 4 and x.device.type == "cpu"):
        return False
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()) or groups(model):
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
    metrics: Mapping[str, Loss | str] | Sequence[str] = (),
    own: Mapping[str, Params] | None = None,
    step: Judge | None = None,
    told: Callable[[str], object] = warnings.warn,
) -> dict[str, dict[str, float]]:
    """The global model on each client's own validation data, by client id.

    ``own``: what clients keep (``Server.own``); each is judged with its own in place. ``step``: as above.
    A metric of one's own that fails on some clients' data, as scores of classes do where there is one
    alone, is NaN there, and ``told`` why; raises ConfigError where it fails on all.
    """
    found, before, metrics = {}, snapshot(model) if own else {}, by_name(metrics)
    failed: dict[str, dict[str, MetricFailed]] = {}
    for client in clients:
        if client.validation is not None:
            if own:
                load(model, before | own.get(client.id, {}))
            found[client.id], without = _scores(model, client.validation, metrics, step)
            for name, why in without.items():
                failed.setdefault(name, {})[client.id] = why
    if own:
        load(model, before)
    for name, who in failed.items():
        first, why = next(iter(who.items()))
        if len(who) == len(found):
            raise why
        more = f" and {len(who) - 1} more" if len(who) > 1 else ""
        told(f"no {name} of client {first}{more}: {why}")
    return found


def _scores(
    model: nn.Module, data: Any, metrics: Mapping[str, Loss], step: Judge | None
) -> tuple[dict[str, float], dict[str, MetricFailed]]:
    """What ``evaluate`` gives, NaN for metrics that fail on these data, and why they do."""
    left, failed = dict(metrics), dict[str, MetricFailed]()
    while left or not failed:
        try:
            found = evaluate(model, data, left, step=step)
            return {k: found.get(k, math.nan) for k in {**found, **failed}}, failed
        except MetricFailed as e:
            failed[e.name] = e
            del left[e.name]
    return dict.fromkeys(failed, math.nan), failed
