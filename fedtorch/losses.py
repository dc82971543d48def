"""Losses and metrics: plain functions ``(output, target) -> Tensor``.

A loss returns one number for each example ([B] or [B, ...]) and is averaged, or a scalar for the
whole batch (a Cox partial likelihood, ``nn.CrossEntropyLoss()``) and is used as it is. The built-in
ones are per example, which is what lets clients with unequal batches train side by side.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtorch.types import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Classes: output [B, ..., C] logits, target [B, ...] integers -> [B, ...]."""
    flat = F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")
    return flat.view(target.shape)


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Two classes: output [B] or [B, 1] logits, target [B] of 0 and 1 -> [B]."""
    return F.binary_cross_entropy_with_logits(
        _like(output, target), target.to(output.dtype), reduction="none"
    )


def mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Regression: output and target of one size -> squared errors."""
    return F.mse_loss(_like(output, target), target.to(output.dtype), reduction="none")


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of classes predicted right, per example [B, ...]."""
    return (output.argmax(-1) == target).float()


def binary_accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share predicted right at a threshold of 0.5 (logit 0), per example [B]."""
    return ((_like(output, target) > 0) == (target > 0.5)).float()


def mean_absolute_error(output: Tensor, target: Tensor) -> Tensor:
    """Absolute error, per example."""
    return (_like(output, target) - target).abs()


def _like(output: Tensor, target: Tensor) -> Tensor:
    # [B, 1] against [B] would broadcast to [B, B] and train on nonsense without a word
    if output.numel() != target.numel():
        raise ConfigError(
            f"the model gives {tuple(output.shape)} but the targets are {tuple(target.shape)}: "
            "this loss needs one output for each target"
        )
    return output.reshape(target.shape)


def reduce(values: Tensor) -> Tensor:
    """A loss or metric's return value -> one number for each example [B], or a scalar as it is."""
    values = torch.as_tensor(values)  # a metric of the user's own may give a plain number
    return values if values.dim() < 2 else values.flatten(1).mean(1)


def backward(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Leave the gradient of a batch's mean loss in the leaves, like ``reduce(...).mean().backward()``.

    Returns the mean loss. To start with a gradient of 1/B spares the nodes of the mean, a tenth of a
    small model's step. Cross entropy takes it as the weight of every class: the first backward that is
    given a gradient to start with imports sympy, a third of a second.
    """
    if loss is cross_entropy and output.dim() == 2 and target.dim() == 1:
        each = output.new_full((output.shape[1],), 1 / len(output))
        value = F.cross_entropy(output, target, each, reduction="sum")
        value.backward()
        return value.detach()
    values = reduce(loss(output, target))
    values.backward(torch.full_like(values, 1 / values.numel()))
    return values.detach().mean()


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
