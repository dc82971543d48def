"""Solvers: ways to run the local steps of a stack of clients, all with the same meaning.

A solver gets the working module and what the clients train on, and returns what they learned. ``general``
is what a PyTorch user would write for one client; ``stacked`` gives each weight a client axis and lets
torch.func.vmap run K clients as one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from fedtorch.privacy.gradients import PrivateSteps, stacked_gradients
from fedtorch.recipe import Recipe
from fedtorch.training.batches import alike, side_by_side
from fedtorch.training.correction import Corrector
from fedtorch.training.dropout import Drawing
from fedtorch.training.local_steps import clip
from fedtorch.training.module import buffers, to, training

# scripts have these from fedtorch.solvers
from fedtorch.training.module import forward as forward
from fedtorch.training.module import load as load
from fedtorch.training.module import snapshot as snapshot
from fedtorch.training.results import Results, Stacked
from fedtorch.training.step import Stepping
from fedtorch.training.trainee import Trainee
from fedtorch.tree import expand, filled, leaves, near, per_client, row
from fedtorch.types import Context, Params, Stack, Task

UNEVEN = (
    "model or loss looks at the whole batch, and these clients' batches are not equally large: train "
    "them one after another (engine.solver general)"
)


@dataclass(frozen=True)
class Chunk:
    """What K clients train on in one round."""

    datasets: Sequence[Dataset]
    order: Sequence[Tensor]
    """Which examples each client takes in which step: [steps, batch] of places, short batches with -1."""
    context: Context
    private: PrivateSteps | None = None
    """With it each step takes its gradient clipped by example and noised."""
    seeds: tuple[int, ...] = ()
    """Of each client's own draws, such as dropout's, [K]: a secret of theirs under some plans."""


class Solver(Protocol):
    """Trains K clients; the ways to do it differ in speed and in what models they take."""

    def __call__(self, model: nn.Module, chunk: Chunk, task: Task, recipe: Recipe) -> Results:
        """What is left after the visits."""


def draws(solve: Solver, recipe: Recipe) -> bool:
    """Whether anything may draw at random as it trains; a solver that knows has a method for it."""
    asked = getattr(solve, "draws", None)
    return asked is None or bool(asked(recipe))


def general(model: nn.Module, chunk: Chunk, task: Task, recipe: Recipe) -> Stacked:
    """One client through the module itself: any model, any loss, any torch optimizer."""
    (data,), (steps,) = chunk.datasets, chunk.order
    start = replace(task, state=task.state | row(chunk.context.own, 0))
    trainee = Trainee(model, start, recipe)
    loss = trainee.visit(data, steps, chunk.context, chunk.private)
    floats = {k: b.clone() for k, b in trainee.floats().items()}
    trainee.put_back()
    # the weights are still the module's own: whoever wants to keep them copies them
    return Stacked(expand(near(trainee.weights())), expand(near(floats)), loss[None], task)


@dataclass(frozen=True)
class Mixed:
    """Another solver under autocast: its large products in bfloat16, weights and steps as they are."""

    solver: Solver

    def __call__(self, model: nn.Module, chunk: Chunk, task: Task, recipe: Recipe) -> Results:
        """What the other leaves."""
        device = next(model.parameters()).device.type
        # without its cache, which would keep the weights of the first step for the whole visit
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            return self.solver(model, chunk, task, recipe)


def normalises(model: nn.Module) -> bool:
    """Whether a layer takes its statistics from the batch, as BatchNorm does in training."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return any(m.training or m.running_mean is None for m in norms)


def evenly(model: nn.Module, order: Sequence[Tensor]) -> bool:
    """Whether no batch has to be filled up; raises ValueError where that would be wrong."""
    even = alike(order)
    if not even and normalises(model):
        raise ValueError(UNEVEN)
    return even


def averaged(losses: Tensor, mask: Tensor, even: bool) -> Tensor:
    """Each client's loss, [K], from those of its examples [K, B], of which it has the ones in ``mask``.

    A loss for whole batches, [K], is as it is; raises ValueError where such batches were filled up.
    """
    if losses.dim() == 2:
        return torch.where(mask, losses, 0).sum(1) / mask.sum(1).clamp(min=1)
    if not even:
        raise ValueError(UNEVEN)
    return losses


def vmapped_losses(
    stepping: Stepping,
    params: Stack,
    rest: Stack,
    batch: Any,
    mask: Tensor,
    drawing: Drawing,
) -> Tensor:
    """Losses of K clients in training from a batch [K, B, ...]: [K, B], or [K] for whole batches.

    Each client has the masks that ``drawing`` draws for it, for the examples in ``mask`` [K, B].
    """

    def one(params: Params, rest: Params, tensors: list[Tensor], client: Tensor) -> Tensor:
        with drawing.at(client):
            return stepping.losses(params, rest, filled(batch, tensors))

    clients = torch.arange(len(mask), device=mask.device)
    return vmap(one, randomness=drawing.begin(mask))(params, rest, leaves(batch), clients)


def stacked(model: nn.Module, chunk: Chunk, task: Task, recipe: Recipe) -> Stacked:
    """K clients at once: every weight gets a client axis and an ordinary torch optimizer steps it.

    The K losses are independent, so the gradient of their sum is each client's own gradient. Clients
    whose steps are over stay as they are. A batch shorter than another client's is filled up with rows
    that count for nothing, which only a model and a loss that look at each example alone do not see.
    Raises ValueError where they would.
    """
    K, ctx, private = len(chunk.datasets), chunk.context, chunk.private
    training(model)
    even = private is None and evenly(model, chunk.order)
    # K copies of every weight and buffer
    names = {k for k, p in model.named_parameters() if p.requires_grad}
    state = {k: ctx.own.get(k, v.expand(K, *v.shape)).clone() for k, v in task.state.items()}
    params = {k: v.requires_grad_() for k, v in state.items() if k in names}
    rest = {k: v for k, v in state.items() if k not in names}
    views = {k: v.detach() for k, v in params.items()}
    optimizer = recipe.client_optimizer.build(params.values(), task.lr)
    correct = Corrector(recipe.strategy, ctx)
    device = next(iter(params.values())).device
    total = torch.zeros(K, dtype=torch.float64)
    # an accelerator's generator draws in an order of its own
    drawing = Drawing(chunk.seeds if device.type == "cpu" else ())
    stepping = Stepping(model, recipe.asked)
    learn: Callable[[Any, Tensor], Tensor] = partial(
        _learn, stepping, params, rest, drawing=drawing, even=even
    )
    if private is not None:
        private = replace(private, drawing=drawing)
        learn = partial(_privately, stepping, params, rest, private)

    # local steps, all clients side by side
    for t, (batch, mask) in enumerate(side_by_side(chunk.datasets, chunk.order, cut=even)):
        batch, mask = to(batch, device), mask.to(device)
        live = t < ctx.steps
        before = None if live.all() else {k: v.detach().clone() for k, v in state.items()}
        optimizer.zero_grad()
        each = learn(batch, mask)
        if recipe.clip_norm is not None:
            clip(params, recipe.clip_norm)
        if correct:
            correct(params, views, stacked=True)
        optimizer.step()
        # whose steps are over stays as it is
        with torch.no_grad():
            total += torch.where(live, each.detach().cpu().double(), 0)
            if before is not None:
                on = live.to(device)
                for k, v in state.items():
                    v.copy_(torch.where(per_client(on, v), v, before[k]))
    floats = {k: v for k, v in rest.items() if v.is_floating_point() and k in buffers(model)}
    return Stacked(near(views), near(floats), total / ctx.steps, task)


def _learn(
    stepping: Stepping,
    params: Stack,
    rest: Stack,
    batch: Any,
    mask: Tensor,
    *,
    drawing: Drawing,
    even: bool,
) -> Tensor:
    """Leave the gradient of each client's batch in its weights; returns the K losses."""
    each = averaged(vmapped_losses(stepping, params, rest, batch, mask, drawing), mask, even)
    each.sum().backward()
    return each


def _privately(
    stepping: Stepping, params: Stack, rest: Stack, private: PrivateSteps, batch: Any, mask: Tensor
) -> Tensor:
    """The same, clipped by example and noised."""
    grads, each = stacked_gradients(stepping, params, rest, batch, mask, private)
    for k, v in params.items():
        v.grad = grads[k]
    return averaged(each, mask, False)
