"""What a loss reaches beside the weights that clients train: it would stay as it is without a word."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.checks import keeps
from fedtorch.checks.tried import two_examples
from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.losses import reduce
from fedtorch.training.module import forward, to, training
from fedtorch.training.outline import untouched
from fedtorch.tree import mapped
from fedtorch.types import ConfigError


def others(given: nn.Module, worker: nn.Module, clients: Sequence[Client], recipe: Recipe) -> None:
    """Refuse what the gradient reaches outside of ``worker``, the copy of ``given`` that clients train.

    Parameters of the loss, a tensor that is no parameter. Raises ConfigError naming it. ``model.aside``
    refuses what reaches the model that was handed over.
    """
    if recipe.local is not None:  # it may ask for any losses
        return
    if isinstance(recipe.loss, nn.Module):
        for name, p in recipe.loss.named_parameters():
            if p.requires_grad and not any(p is own for own in given.parameters()):
                _refuse("loss", f"{name} {list(p.shape)}")
    word = "loss" if recipe.step is None else "step"
    batch = to(two_examples(clients[0].data), next(worker.parameters()).device)
    with untouched(worker), seeds.seeded(0):
        first, again = ([*leaves(recipe.losses(training(worker), batch))] for _ in range(2))
        own = {id(p) for p in worker.parameters()}
        # what a step makes for itself is another each time
        found = [t for t in first if id(t) not in own and any(t is other for other in again)]
        if not recipe.privacy.per_example:  # whose trials say what it would void
            with torch.no_grad():
                forgets(worker, batch, recipe)
    for t in found:
        t.grad = None  # what the trial before left there
        if isinstance(t, nn.Parameter):
            _refuse(word, f"of shape {list(t.shape)}")
        raise ConfigError(
            f"the {word} reaches a tensor of shape {list(t.shape)} that requires a gradient and is no "
            "parameter of the model, so that nobody trains it: make it an nn.Parameter of the model, "
            "or detach it"
        )


def forgets(model: nn.Module, batch: Any, recipe: Recipe) -> None:
    """Raises ConfigError where the loss is another after it was asked for others."""
    if recipe.step is None:  # the model's own part is left out
        x, y = batch
        loss, given = recipe.loss, forward(model, x)
        keeps.nothing("loss", loss, lambda output: reduce(loss(output, y)), given, _halved(given))
        return

    def ask(batch: Any) -> Tensor:
        with untouched(model):
            return recipe.tried(model, batch)

    keeps.nothing("step", recipe.step, ask, batch, _halved(batch))


def _halved(given: Any) -> Any:
    return mapped(lambda t: 0.5 * t if t.is_floating_point() else t, given)


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward pass would leave a gradient in."""
    seen: set[object] = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(t := getattr(node, "variable", None), Tensor):
            yield t
        nodes += [before for before, _ in node.next_functions]


def _refuse(word: str, which: str) -> None:
    raise ConfigError(
        f"the {word} has a trainable parameter ({which}), and clients train the model's alone: make it a "
        "parameter of the model, which may return it beside its output (layers in a plain list are in "
        "none: nn.ModuleList), or freeze it with requires_grad_(False)"
    )
