"""What figures inside the budget are made of: loss and accuracy of each example, at the model as sent."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.client import Client
from fedtorch.privacy.told import NUMBERS
from fedtorch.recipe import Recipe
from fedtorch.training.asked import MOST
from fedtorch.training.batches import in_order
from fedtorch.training.losses import Loss, reduce, usual_metrics
from fedtorch.training.module import forward, load, to
from fedtorch.training.outline import Outline
from fedtorch.training.sequential import naming_client
from fedtorch.training.step import pair
from fedtorch.tree import mapped
from fedtorch.types import ConfigError, Task


def examples(
    clients: Sequence[Client], task: Task, recipe: Recipe, model: nn.Module
) -> tuple[Tensor, ...]:
    """Of every example of each client (1/2, loss, right), each within 1/2 of 0, [n, 3], float64.

    In evaluation mode, with what clients were sent alone: a part of the model that is a client's own is
    made of its data, and would let one example move the figures of all. ``model`` is overwritten.
    """
    outline, found = Outline(model, own=True), list[Tensor]()
    modes = [(m, m.training) for m in model.modules()]
    device = next(model.parameters()).device
    alone = recipe.privacy.per_example is not None and recipe.privacy.per_example.mode == "alone"
    load(model, task.state)
    model.eval()
    try:
        for client in clients:
            draw = seeds.derive(recipe.privacy.draw_seed(task, client.id), "told")
            with naming_client([client.id], task), seeds.seeded(draw):
                parts = in_order(client.data, 1 if alone else MOST)
                rows = [halves(model, to(b, device), len(i), recipe) for i, b in parts]
                found.append(torch.cat(rows) if rows else torch.zeros(0, NUMBERS).double())
            outline.restore()
    finally:
        for m, was in modes:
            m.training = was
    return tuple(found)


def halves(model: nn.Module, batch: Any, n: int, recipe: Recipe) -> Tensor:
    """Of a batch of ``n`` examples: [n, 3]."""
    most, metric = recipe.privacy.metrics_loss, right(recipe)
    batch = mapped(lambda t: t.detach().clone(), batch)  # a model may write on it
    with torch.set_grad_enabled(recipe.step is not None):
        if recipe.step is not None:
            loss, hit = recipe.losses(model, batch), torch.full((n,), 0.5)
        else:
            x, y = pair(batch)
            output = forward(model, x)
            loss = reduce(recipe.loss(output, y))
            hit = torch.full((n,), 0.5) if metric is None else reduce(metric(output, y))
    loss, hit = (v.detach().cpu().double() for v in (loss, hit))
    if loss.dim() == 0 and recipe.privacy.unit == "client":
        loss = loss.expand(n)  # of the batch, and whoever is hidden has all of it
    if loss.shape != (n,) or hit.shape != (n,):
        raise ConfigError(
            f"privacy.metrics_epsilon needs one loss and one score for each of {n} examples, and got "
            f"{list(loss.shape)} and {list(hit.shape)}"
        )
    loss = loss.nan_to_num(most, most, 0.0).clamp(0.0, most) / most - 0.5
    hit = hit.nan_to_num(0.0).clamp(0.0, 1.0) - 0.5
    return torch.stack([torch.full((n,), 0.5).double(), loss, hit], 1)


def right(recipe: Recipe) -> Loss | None:
    """The share of an example that is right, where the loss says what that is; else None."""
    if recipe.step is not None or recipe.local is not None:
        return None
    known = usual_metrics(recipe.loss)
    found: Callable[..., Tensor] | None = known.get("accuracy") or known.get("binary_accuracy")
    return found
