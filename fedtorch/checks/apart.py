"""Whether rows of a batch are its examples as they would be collated alone, tried before private training.

Padding may tell an example how long its neighbours are, and a graph of several has no row for each. A
private gradient must hang on its own example alone: where rows do not, each is collated by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch.checks.held import RowDraws
from fedtorch.checks.precise import Tried, precise
from fedtorch.checks.stacking import shapes_in
from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.batches import Collated, fetch, len_of
from fedtorch.training.module import to
from fedtorch.tree import Apart, mapped, rows, size


def needed(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> str | None:
    """Why the examples of some client must each be collated alone; None: rows of a batch are as good."""
    if not recipe.privacy.per_example:
        return None
    own = [c.data for c in clients if isinstance(c.data, Collated) and c.data.collate]
    found = (_needed(model, d, recipe) for d in {id(d.collate): d for d in own}.values())
    return next((why for why in found if why), None)


def _needed(model: nn.Module, data: Dataset, recipe: Recipe) -> str | None:
    index = torch.arange(len_of(data))
    if len({shapes_in(data[k]) for k in index.tolist()}) == 1:
        return (
            "the examples looked at are all of one size, so that nothing shows what others would do"
        )
    device = next(model.parameters()).device
    try:
        batch, each = (to(fetch(data, index, apart), device) for apart in (False, True))
        with precise(model, batch, recipe) as (own, fine):
            double = fine is not own
            each = mapped(lambda t: t.double() if double and t.is_floating_point() else t, each)
            alike = size(batch) == len(index) and _alike(fine, each)
    except Exception:  # of what has no rows, or takes none
        alike = False
    return (
        None
        if alike
        else "rows of a batch that a collate makes are not its examples collated alone"
    )


def _alike(tried: Tried, each: Apart) -> bool:
    """Whether losses and gradients in a batch, of its rows and of examples collated alone are the same."""
    model, recipe, batch, near, held = tried
    with held.of(torch.arange(len(each))):
        together = recipe.losses(model, batch)
    for k, single in enumerate(each):
        row, own = rows(batch, slice(k, k + 1)), torch.tensor([k])
        found = [_gradient(model, recipe, part, held.of(own)) for part in (single, row)]
        (loss, own), (other, of_row) = found
        losses = torch.stack([loss, loss]), torch.stack([other, together[k].detach()])
        if not torch.allclose(*losses, rtol=near.rtol, atol=near.atol, equal_nan=True):
            return False
        if not float((own - of_row).norm()) <= near.rtol * float(own.norm()) + near.atol:
            return False
    return True


def _gradient(
    model: nn.Module, recipe: Recipe, batch: Any, held: RowDraws
) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    with held:
        (loss,) = recipe.losses(model, batch)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat([g.detach().flatten() for g in grads])
