"""MOON: what a client's model sees in an example is held near what the shared model sees in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtorch.options import NOT_NEGATIVE, POSITIVE, check
from fedtorch.strategies.base import Strategy
from fedtorch.strategies.needs import whole_models
from fedtorch.training.losses import reduce
from fedtorch.training.module import evaluating
from fedtorch.training.step import Step, Stepping
from fedtorch.tree import tmap
from fedtorch.types import ConfigError, Context, Params, Stack


@dataclass(frozen=True, kw_only=True)
class MOON(Strategy):
    """Adds mu times a contrast of features to each local loss (Li et al. 2021, arXiv:2103.16257, eq. 3).

    z are an example's features in the model that trains, and it is drawn to those in the model as it was
    sent and away from those in the client's own last one, both in evaluation mode. The paper takes z behind
    a projection head, not from logits. Before a client's second visit the contrast moves nothing.
    """

    tap: str = ""
    """The layer whose outputs are z, by name."""
    mu: float = 1.0
    """Weight of the contrast; the paper's are 0.1, 1, 5 and 10, by data set."""
    temperature: float = 0.5
    """What cosines are divided by."""

    def __post_init__(self) -> None:
        """Refuse a weight that would push away from the shared model."""
        check(self, "strategy", mu=NOT_NEGATIVE, temperature=POSITIVE)

    def prepare(self, model: nn.Module) -> Strategy:
        """Raises ConfigError where there is no such layer, or more than weights."""
        whole_models(self, model)
        names = [k for k, _ in model.named_modules() if k]
        if not names[1:]:
            raise ConfigError(
                f"strategy moon compares the outputs of a layer before the last, and model "
                f"{type(model).__name__} has no layer before another: use strategy fedavg"
            )
        if self.tap not in names:
            raise ConfigError(
                f"strategy.tap {self.tap!r} is no layer of model {type(model).__name__}: it has "
                f"{', '.join(names[-6:])}; name one before the last, whose outputs are features, such as "
                f"{names[-2:][0]}"
            )
        return self

    def remember(self, params: Params) -> dict[str, Params]:
        """A client's own last model, at first the one that it was sent."""
        return {"last": dict(params)}

    def objective(self, step: Step, ctx: Context) -> Step:
        """The loss and the contrast."""
        sent, last = ({k: v[0] for k, v in s.items()} for s in (ctx.anchor, ctx.memory["last"]))

        def contrasted(model: nn.Module, batch: Any) -> Tensor:
            with self._seen(model) as seen:
                losses = reduce(step(model, batch))
                self._moves(seen)
                z = seen[-1]
                with torch.no_grad(), evaluating(model):
                    for weights in (sent, last):
                        Stepping(model, step).losses(weights, {}, batch)
                away = contrast(z, seen[-2], seen[-1], self.temperature)
            return losses + self.mu * (away if losses.dim() else away.mean())

        return contrasted

    def upload(self, params: Stack, ctx: Context) -> tuple[dict[str, Stack], dict[str, Stack]]:
        """The change; the model stays for the next visit."""
        return {"delta": tmap(torch.sub, params, ctx.anchor)}, {"last": params}

    def _moves(self, seen: list[Tensor]) -> None:
        """Refuse features that no step can change: the contrast would do nothing."""
        why = "no trained weight comes before it, so that the contrast would move nothing"
        if not seen:
            why = "the model does not run it"
        elif seen[-1].requires_grad or not torch.is_grad_enabled():
            return
        raise ConfigError(
            f"strategy.tap {self.tap!r} gives no features to learn: {why}; name a layer behind trained "
            "ones, such as the one before the last"
        )

    @contextmanager
    def _seen(self, model: nn.Module) -> Iterator[list[Tensor]]:
        seen: list[Tensor] = []
        handle = model.get_submodule(self.tap).register_forward_hook(
            lambda module, given, z: seen.append(z.flatten(1))
        )
        try:
            yield seen
        finally:
            handle.remove()


def contrast(z: Tensor, near: Tensor, far: Tensor, temperature: float) -> Tensor:
    """Of each row -log of the share that the near one's cosine has in both, [B]."""
    cosines = torch.stack([F.cosine_similarity(z, other) for other in (near, far)], 1)
    return F.cross_entropy(
        cosines / temperature,
        torch.zeros(len(z), dtype=torch.long, device=z.device),
        reduction="none",
    )
