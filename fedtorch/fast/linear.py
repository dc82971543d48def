"""What of a recipe is linear in gradients and weights, and so has a fast form."""

from typing import NamedTuple

import torch
from torch import Tensor

from fedtorch.fast.layers import Leaf, Rule
from fedtorch.recipe import Recipe
from fedtorch.strategies import Strategy
from fedtorch.training.correction import correction
from fedtorch.training.local_steps import OWN, VARIES, varies
from fedtorch.types import Context, Params, Stack


class Steps(NamedTuple):
    """How the clients of a chunk step, and what is each one's own in it."""

    rule: Rule
    shift: Stack
    """What is added to each gradient, [K, ...], or empty."""
    start: Stack
    """Weights of their own that they start from, [K, ...], or empty: from the shared ones."""

    @property
    def own(self) -> bool:
        """Whether each client's weights have something in them that is no product of its examples."""
        return bool(self.shift or self.start)

    @property
    def full(self) -> bool:
        """Whether that is more than one matrix, and changes from step to step."""
        return bool(self.rule.momentum or (self.shift and self.start))

    def leaf(self, name: str, weight: Tensor, clients: int, each: Stack | None = None) -> Leaf:
        """Copies of a parameter, or of a bias with an axis of rows before it.

        ``each``: the shared one that each client began with, [K, ...], where they are not the same.
        """
        if each and name in each:
            return Leaf(each[name], clients, self.rule, None, each[name].clone())
        start = self.start.get(name)
        if start is not None:
            start = start.reshape(clients, *weight.shape)
            start = start.clone(memory_format=torch.contiguous_format)
        return Leaf(weight, clients, self.rule, self.shift.get(name), start)


def linear(recipe: Recipe, ctx: Context, state: Params, lr: float) -> Steps:
    """Optimizer and strategy as one rule, and what is each client's own; ``state``: shared weights."""
    args, (pull, shift) = recipe.client_optimizer.args, correction(recipe.strategy, ctx)
    rule = Rule(lr, args.get("momentum", 0.0), args.get("weight_decay", 0.0), pull)
    return Steps(rule, shift, {k: v.to(state[k]) for k, v in ctx.own.items() if k in state})


def optimizer(recipe: Recipe) -> str | None:
    """SGD, with momentum and weight decay, by one rate and by gradients as they are."""
    if recipe.local is not None:
        return OWN
    client = recipe.client_optimizer
    if client.maker() is not torch.optim.SGD:
        return f"the client optimizer is {client.words}, not SGD"
    if recipe.clip_norm is not None:
        return "gradients are clipped (clip_norm)"
    if varies(recipe):
        return VARIES
    args = client.args
    other = sorted(k for k, v in args.items() if v and k not in ("momentum", "weight_decay"))
    return f"SGD with {other[0]}" if other else None


def plain(recipe: Recipe) -> bool:
    """SGD without momentum and weight decay, and gradients as they are."""
    args, kind = recipe.client_optimizer.args, type(recipe.strategy)
    corrected = kind.correction is not Strategy.correction
    return not (args.get("momentum") or args.get("weight_decay") or corrected)


def strategy(recipe: Recipe) -> str | None:
    """Gradients are changed by a ``Correction`` alone, which is linear in the weights."""
    kind = type(recipe.strategy)
    if recipe.strategy.personal:
        return "weights stay with the clients (strategy.personal)"
    if recipe.strategy.trains and not recipe.strategy.apart:
        return f"{kind.__name__} trains in more than one pass"
    if recipe.strategy.contrasts:
        return f"{kind.__name__} changes what local steps minimise"
    if kind.rests is not Strategy.rests:
        return f"{kind.__name__} lets weights rest by turns"
    if kind.correct is Strategy.correct:
        return None
    return (
        f"{kind.__name__} corrects gradients in its own way "
        "(what is linear in the weights can be its correction)"
    )
