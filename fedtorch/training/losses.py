"""Losses and metrics: plain functions ``(output, target) -> Tensor``.

A loss returns one number for each example ([B] or [B, ...]) and is averaged, or a scalar for the
whole batch (a Cox partial likelihood, ``nn.CrossEntropyLoss()``) and is used as it is. The built-in
ones are per example, which is what lets clients with unequal batches train side by side.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtorch.types import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]

IGNORED = -100
"""The class of positions that do not count, as in ``torch.nn.functional.cross_entropy``."""


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Classes, as ``F.cross_entropy`` reads them: output [B, C, ...] logits, target [B, ...] -> [B, ...].

    Classes lie on axis 1, whatever the other sizes are: text is [B, C, T], a segmentation [B, C, H, W].
    A float target of the output's shape holds probabilities of the classes. Positions of class -100
    are ignored: those of an example that count are weighed so that the example's mean is theirs, and an
    example without any has a loss of 0. Raises ConfigError where the shapes do not fit.
    """
    if target.shape == output.shape and target.is_floating_point() and target.dim() > 1:
        return F.cross_entropy(output, target, reduction="none")
    _one_axis_less(output, target)
    if output.dim() == 2:
        return F.cross_entropy(output, target, reduction="none")
    # classes last, as the flat kernel takes them: of text that a model turned round it is a view
    flat = F.cross_entropy(output.movedim(1, -1).flatten(0, -2), target.flatten(), reduction="none")
    return flat.view(target.shape) * _weights(target)


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Two classes: output [B] or [B, 1] logits, target [B] of 0 and 1 -> [B]."""
    return F.binary_cross_entropy_with_logits(
        _like(output, target), target.to(output.dtype), reduction="none"
    )


def mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Regression: output and target of one size -> squared errors in the target's shape, [B, ...]."""
    return F.mse_loss(_like(output, target), target.to(output.dtype), reduction="none")


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of classes predicted right: output [B, C, ...], target [B, ...] -> per example [B, ...].

    Positions of class -100 do not count, as in ``cross_entropy``. One logit, [B] or [B, 1, ...], is of yes
    or no.
    """
    if output.dim() == 1 or (output.shape[1] == 1 and output.numel() == target.numel()):
        return binary_accuracy(output, target)
    _one_axis_less(output, target)
    hits = (output.argmax(1) == target).float()
    return hits if output.dim() == 2 else hits * _weights(target)


def binary_accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share predicted right at a threshold of 0.5 (logit 0), per example [B]."""
    return ((_like(output, target) > 0) == (target > 0.5)).float()


def mean_absolute_error(output: Tensor, target: Tensor) -> Tensor:
    """Absolute errors, output and target of one size, in the target's shape, [B, ...]."""
    return (_like(output, target) - target).abs()


def counted(metric: Loss, target: Tensor) -> Tensor | None:
    """How many positions of each example count, [B]; None: the metric counts every example alike."""
    if metric not in (cross_entropy, accuracy) or target.is_floating_point():
        return None
    kept = target != IGNORED
    if target.dim() == 1 and bool(kept.all()):
        return None
    return kept.flatten(1).sum(1) if target.dim() > 1 else kept.long()


def gathers(metric: object) -> bool:
    """Whether a metric takes in batch after batch, as those of torchmetrics do."""
    return all(callable(getattr(metric, k, None)) for k in ("reset", "update", "compute"))


def _weights(target: Tensor) -> Tensor:
    # [B, ...]: 1 where everything counts, so that no bit changes there
    kept = (target != IGNORED).flatten(1)
    weight = kept.shape[1] / kept.sum(1, keepdim=True).clamp(min=1)
    return (kept * weight).view(target.shape)


def _one_axis_less(output: Tensor, target: Tensor) -> None:
    if output.dim() < 2 or (output.shape[0], *output.shape[2:]) != target.shape:
        fix = "classes lie on axis 1, as in torch's: output [B, C, ...] has targets [B, ...]"
        if output.shape == target.shape and output.dim() > 1:
            fix = "one-hot targets must be floats, y.float(), or classes, y.argmax(1)"
        elif target.dim() == 2 and target.shape[1] == 1:
            fix += ": give y[:, 0]"
        raise ConfigError(
            f"the model gives {tuple(output.shape)} but the targets are {tuple(target.shape)}; {fix}"
        )


def _like(output: Tensor, target: Tensor) -> Tensor:
    # [B, 1] against [B] would broadcast to [B, B] and train on nonsense without a word
    if output.numel() != target.numel():
        raise ConfigError(
            f"the model gives {tuple(output.shape)} but the targets are {tuple(target.shape)}: "
            "this loss needs one output for each target"
        )
    return output.reshape(target.shape)


def no_loss(output: Tensor, target: Tensor) -> Tensor:
    """Stands where a recipe has a step; raises ConfigError, as nobody asks that for a loss of outputs."""
    raise ConfigError("this recipe has a step in place of a loss")


def reduce(values: Any) -> Tensor:
    """A loss or metric's return value -> one number for each example [B], or a scalar as it is."""
    if values is None or isinstance(values, dict | tuple | str):
        raise ConfigError(
            "a loss, a step and a metric return numbers, one for each example or one for all, got "
            f"{type(values).__name__}"
        )
    found: Tensor = torch.as_tensor(values)  # a metric of the user's own may give a plain number
    return found if found.dim() < 2 else found.flatten(1).mean(1)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "bce": binary_cross_entropy,
    "mse": mean_squared_error,
}

METRICS: dict[str, Loss] = {
    "accuracy": accuracy,
    "binary_accuracy": binary_accuracy,
    "mae": mean_absolute_error,
}

DEFAULTS = {
    "classification": ("cross_entropy", "accuracy"),
    "binary": ("bce", "binary_accuracy"),
    "regression": ("mse", "mae"),
}
"""Kind of task -> the loss and the metric it is trained and judged by unless told otherwise."""


def usual_metrics(loss: Loss) -> dict[str, Loss]:
    """What is usual beside a loss, by name, where that is not to be asked for."""
    of = {nn.CrossEntropyLoss: "cross_entropy", nn.BCEWithLogitsLoss: "bce", nn.MSELoss: "mse"}
    name = next((n for n, f in LOSSES.items() if f is loss), of.get(type(loss)))
    return {m: METRICS[m] for n, m in DEFAULTS.values() if n == name}
