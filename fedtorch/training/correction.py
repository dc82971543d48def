"""What a strategy makes of the gradients of local steps: the one place where all solvers ask for it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedtorch import seeds
from fedtorch.strategies import Correction, Strategy
from fedtorch.types import Context, Stack


def correction(strategy: Strategy, ctx: Context) -> tuple[float, Stack]:
    """The strategy's pull and shift for this visit; the shift [K, ...] of every weight, or empty.

    Raises ValueError where it has a number or a name that cannot be meant.
    """
    if type(strategy).correction is Strategy.correction:
        return 0.0, {}
    with seeds.seeded(seeds.derive(0, "correction", *ctx.seeds)):
        found, who = strategy.correction(ctx), f"{type(strategy).__name__}.correction"
    if not isinstance(found, Correction):
        raise ValueError(f"{who} must return a Correction, not {type(found).__name__}")
    pull, shift = float(found.pull), found.shift or {}
    if not math.isfinite(pull):
        raise ValueError(f"{who} has the pull {pull}, which is no finite number")
    if unknown := sorted(shift.keys() - ctx.anchor.keys()):
        raise ValueError(f"{who} shifts {unknown[0]}, which is no trainable weight")
    clients = len(ctx.steps)
    for name, v in shift.items():
        shape = ctx.anchor[name].shape[1:]
        if v.shape not in ((1, *shape), (clients, *shape)):
            raise ValueError(
                f"{who} shifts {name} by {list(v.shape)}, not by {[clients, *shape]} or {[1, *shape]}"
            )
    if not shift:
        return pull, {}
    zero = {n: torch.zeros_like(w) for n, w in ctx.anchor.items() if n not in shift}
    whole = {n: (zero[n] if n in zero else shift[n]).to(w) for n, w in ctx.anchor.items()}
    return pull, {n: v.expand(clients, *v.shape[1:]) for n, v in whole.items()}


class Corrector:
    """Corrects the gradients of a visit's steps; false where the strategy takes them as they are."""

    def __init__(self, strategy: Strategy, ctx: Context) -> None:
        """Asks the strategy for its correction."""
        self.strategy, self.ctx = strategy, ctx
        self.pull, self.shift = correction(strategy, ctx)
        self.own = type(strategy).correct is not Strategy.correct
        self.draws = seeds.Draws("correct", *ctx.seeds)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.own or self.pull or self.shift)

    def __call__(self, params: Mapping[str, Tensor], weights: Stack, stacked: bool = False) -> None:
        """Replace the gradients of ``params``, whose values are ``weights`` [K, ...].

        ``stacked``: parameters have a client axis themselves. Weights that the loss never reached stay out.
        """
        with torch.no_grad():
            # what is a client's own has no anchor, and is no strategy's to correct
            shared = self.ctx.anchor
            known = {k: p.grad for k, p in params.items() if p.grad is not None and k in shared}
            grads = {
                k: self._added(g if stacked else g[None], weights, k) for k, g in known.items()
            }
            if self.own:
                weights = {k: w for k, w in weights.items() if k in shared}
                shown = {
                    k: grads[k] if k in grads else torch.zeros_like(w) for k, w in weights.items()
                }
                with self.draws():  # not from dropout's, which may be a secret of the client's
                    grads = self.strategy.correct(shown, weights, self.ctx)
            for k in known:
                params[k].grad = grads[k] if stacked else grads[k][0]

    def _added(self, g: Tensor, weights: Stack, name: str) -> Tensor:
        if self.pull:
            g = g.add(weights[name] - self.ctx.anchor[name], alpha=self.pull)
        return g + self.shift[name] if self.shift else g
