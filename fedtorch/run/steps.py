"""Steps that options name: by what a model is trained and judged where no loss of (x, y) says it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.data.base import subset
from fedtorch.options import find
from fedtorch.recipe import Recipe
from fedtorch.run.setup import loss_and_metrics
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.evaluate import Judge
from fedtorch.training.losses import Loss
from fedtorch.training.module import evaluating, to
from fedtorch.types import ConfigError

FUNCTION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,199}:[A-Za-z_][A-Za-z0-9_]{0,99}")
"""package.module:function; of the working folder by the file's name without .py."""


def check(option: str, name: str) -> None:
    """Refuse what is no name of a function, before anything is imported."""
    if FUNCTION_NAME.fullmatch(name) and ".py:" not in name:
        return
    raise ConfigError(
        f"{option} must be package.module:function, such as steps:fn for fn of steps.py in the working "
        f"folder, got {name[:99]!r}"
    )


def function_named(option: str, name: str) -> Callable[..., Any]:
    """The function of this name; raises ConfigError where there is none."""
    check(option, name)
    found = find(name)
    if isinstance(found, type) or not callable(found):
        raise ConfigError(f"{option} {name!r} is no function (model, batch)")
    return found  # type: ignore[no-any-return]


def judging(
    recipe: Recipe,
    eval_step: str,
    kind: str,
    metrics: Sequence[str],
    model: nn.Module,
    data: Dataset,
) -> tuple[Mapping[str, Loss], Judge | None]:
    """By which metrics, and which step (None: they see the model's output), a run judges its model.

    ``metrics`` as options name them. Where they are left open an ``eval_step`` may give figures of its own
    in their place, and without one a recipe's step is judged by its own losses.
    """
    left_open = [*metrics] == ["auto"]
    judge = function_named("eval_step", eval_step) if eval_step else None
    if judge is None and recipe.step is not None and left_open:
        return {}, lambda model, batch: {"loss": recipe.tried(model, batch)}
    few = subset(data, torch.arange(min(2, len_of(data))))
    if judge is None and recipe.step is not None and len_of(few) and not _pairs(few):
        raise ConfigError(
            f"metrics {','.join(metrics)} look at the model's output for (x, y), and batches of these data "
            "are none: give --eval-step package.module:function, which returns (output, target)"
        )
    if judge is not None and left_open and len_of(few) and _gives_figures(judge, model, few):
        return {}, judge
    _, chosen = loss_and_metrics(kind, "auto", metrics)
    if recipe.step is None:
        return chosen | {"loss": recipe.loss}, judge
    return {k: m for k, m in chosen.items() if k != "loss"}, judge


def _pairs(data: Dataset) -> bool:
    batch = fetch(data, torch.arange(len_of(data)))
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def _gives_figures(judge: Judge, model: nn.Module, data: Dataset) -> bool:
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), seeds.seeded(0):
        return isinstance(
            judge(model, to(fetch(data, torch.arange(len_of(data))), device)), Mapping
        )
