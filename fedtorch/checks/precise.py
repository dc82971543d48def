"""A model, a batch and what is asked of them in a trial: in float64 where they take it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.checks.company import Near
from fedtorch.checks.held import RowDraws
from fedtorch.recipe import Recipe
from fedtorch.training.module import forward, resting_dropout, training, undropped
from fedtorch.training.outline import copied, untouched
from fedtorch.tree import leaves, mapped, rows, size


class Tried(NamedTuple):
    """A model and a batch in one type of numbers."""

    model: nn.Module
    recipe: Recipe
    batch: Any
    near: Near
    held: RowDraws
    """What it draws, other than by dropout."""

    def losses(self, index: Tensor) -> Tensor:
        """Of the examples at ``index``."""
        with self.held.of(index):
            return self.recipe.tried(self.model, rows(self.batch, index))

    def gradient(self, index: Tensor) -> Tensor:
        """Of the sum of these examples' losses, flat."""
        self.model.zero_grad()
        with self.held.of(index):
            self.recipe.losses(self.model, rows(self.batch, index)).sum().backward()
        # a weight that the examples do not reach, as an expert not chosen, has no gradient
        every = [(p, p.grad) for p in self.model.parameters() if p.requires_grad]
        found = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in every]
        return torch.cat([g.detach().flatten().double() for g in found])


@contextmanager
def precise(model: nn.Module, batch: Any, recipe: Recipe) -> Iterator[tuple[Tried, Tried]]:
    """Try a model as it is, and in the finest numbers that it takes; in the end it is as it was."""
    own = Tried(model, recipe, batch, Near(1e-3, 1e-5), RowDraws(0, size(batch)))
    with seeds.seeded(0), untouched(model), undropped(model):
        fine = _in_float64(own)
        with untouched(fine.model), resting_dropout(fine.model):
            yield own, fine


def _in_float64(own: Tried) -> Tried:
    """The same in float64; as it is where that is not taken."""
    try:
        wide = copied(own.model).double()
        batch = mapped(lambda t: t.double() if t.is_floating_point() else t, own.batch)
        with torch.no_grad(), untouched(wide):
            recipe = _copied(own.recipe)
            if recipe.tried(training(wide), batch).dtype != torch.float64:
                return own
    except Exception:
        return own
    return own._replace(model=wide, batch=batch, near=Near(1e-6, 1e-9))


def another(recipe: Recipe) -> Recipe:
    """With a copy of the loss, or of the step, where it can be copied: it may count or keep."""
    try:
        return _copied(recipe)
    except Exception:
        return recipe


def _copied(recipe: Recipe) -> Recipe:
    if recipe.step is None:
        return replace(recipe, loss=copy.deepcopy(recipe.loss))
    return replace(recipe, step=copy.deepcopy(recipe.step))


def products(model: nn.Module, batch: Any, recipe: Recipe) -> int:
    """About how many numbers a forward of one example multiplies, by the weights and outputs of layers."""
    found: list[int] = []

    def count(module: nn.Module, _: Any, output: Any) -> None:
        made = sum(t.numel() for t in leaves(output))
        weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        found.extend(p.numel() * made // p.shape[0] for p in weights)

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    try:
        with torch.no_grad():
            one = rows(batch, torch.tensor([0]))
            # a loss, which may keep what it is given, is not asked
            forward(model, one[0]) if recipe.step is None else recipe.tried(model, one)
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, sum(found))
