"""A whole local update of the user's own: GANs, alternating schemes, losses asked several times a step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch.options import shown
from fedtorch.training.batches import batches
from fedtorch.training.module import forget, to
from fedtorch.types import ConfigError


class VisitBatches:
    """A visit's batches, where the model is: as many as its steps; gone through again, they come again."""

    def __init__(self, data: Dataset, plan: Tensor, device: torch.device) -> None:
        """``plan``: places in ``data`` that each batch has, [steps, batch], short ones with -1."""
        self.data, self.plan, self.device = data, plan, device

    def __len__(self) -> int:
        """How many."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Any]:
        """Each, as the dataset's collation makes it."""
        return (to(batch, self.device) for batch in batches(self.data, self.plan))


OwnUpdate = Callable[[nn.Module, VisitBatches, float], Any]
"""``fn(model, batches, lr)`` trains the model in place; it returns the visit's loss, or None."""


def own_update(update: OwnUpdate, model: nn.Module, visit: VisitBatches, lr: float) -> Tensor:
    """Have a function of the user's own train the model; its loss, one float64, NaN where it tells none.

    What it froze for a while is as it was, and no gradients stay. Raises ConfigError for other results.
    """
    params = dict(model.named_parameters())
    trained = [p for p in params.values() if p.requires_grad]
    try:
        with torch.enable_grad():
            found = update(model, visit, lr)
    finally:
        forget(params)
        for p in trained:
            p.requires_grad_()
    after = dict(model.named_parameters())
    if params.keys() != after.keys() or any(p is not after[k] for k, p in params.items()):
        raise ConfigError("local puts other parameters into the model: change them in place")
    if found is None:
        return torch.tensor(math.nan, dtype=torch.float64)
    if isinstance(found, Tensor) and found.numel() == 1:
        found = float(found.detach())
    if not isinstance(found, (int, float)):
        raise ConfigError(
            f"local must return the visit's loss, a number, or None, got {shown(found)}"
        )
    # one that is told is a figure also where it is no number
    return torch.tensor(float(found), dtype=torch.float64).nan_to_num(math.inf, math.inf)
