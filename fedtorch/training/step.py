"""Steps: what the losses of a batch are. Whoever trains or tries a model asks a step, and nothing else.

A batch is whatever the dataset yields, collated: any nesting of tensors. What is in it is a step's to know.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedtorch.training.losses import Loss, cross_entropy, reduce
from fedtorch.training.module import forward
from fedtorch.types import ConfigError, Params

Step = Callable[[nn.Module, Any], Tensor]
"""``step(model, batch)`` -> a loss for each example [B], or one number for the batch."""

PAIRS = (
    "a dataset must give (x, y) pairs, unless a step that knows its batches is given: Recipe(step=fn), "
    "evaluate(..., step=fn)"
)


@dataclass(frozen=True)
class Supervised:
    """The step of a recipe with a loss: the batch is (x, y), and the model's output is held to y."""

    loss: Loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """What the loss returns."""
        x, y = pair(batch)
        return self.loss(forward(model, x), y)


def pair(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets; raises ConfigError where a batch is no pair."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        kind = type(batch).__name__
        parts = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ConfigError(f"{PAIRS} (here a batch is a {kind}{parts})")
    x, y = batch
    return x, y


def asked(step: Step, model: nn.Module, batch: Any) -> Tensor:
    """Losses of a batch, [B], or one number; raises ConfigError where a step of one's own gives more.

    What a loss gives of each output is averaged, as torch's own are; what a step means by it, it says.
    """
    values = step(model, batch)
    if isinstance(values, Tensor) and values.dim() > 1 and not isinstance(step, Supervised):
        raise ConfigError(
            f"a step must return one number for each example, [B], or one for the batch, got "
            f"{list(values.shape)}: add up or average what belongs to an example, "
            "losses.flatten(1).mean(1)"
        )
    return reduce(values)


class Stepping(nn.Module):
    """A model whose forward is the step, so that all a step takes of it may be put in another's place."""

    step: Step
    ties: dict[str, str]

    def __init__(self, model: nn.Module, step: Step) -> None:
        super().__init__()
        self.model = model
        self.__dict__["step"] = step  # a module of its own is no part of the model
        self.__dict__["ties"] = ties(model)

    def forward(self, batch: Any) -> Tensor:
        """Losses of a batch, [B], or one number for the whole of it."""
        return asked(self.step, self.model, batch)

    def losses(self, params: Params, rest: Params, batch: Any) -> Tensor:
        """The same with other weights and buffers."""
        named = {f"model.{k}": v for k, v in (params | rest).items()}
        shared = {f"model.{k}": named.get(f"model.{first}") for k, first in self.ties.items()}
        named |= {k: v for k, v in shared.items() if v is not None}
        # torch ties them by all names, and leaves a layer of two names without its weights
        found: Tensor = functional_call(self, named, (batch,), tie_weights=False)
        return found


def ties(model: nn.Module) -> dict[str, str]:
    """Other names of weights and buffers that several layers share, and their first."""
    first: dict[int, str] = {}
    found = {}
    for prefix, m in model.named_modules():
        for name, t in (*m._parameters.items(), *m._buffers.items()):
            place = f"{prefix}.{name}" if prefix else name
            if t is not None and first.setdefault(id(t), place) != place:
                found[place] = first[id(t)]
    return found


def backward(step: Step, model: nn.Module, batch: Any, share: float = 1.0) -> Tensor:
    """Leave the gradient of a batch's mean loss in the leaves, like ``losses.mean().backward()``.

    Of that only the ``share``, as of a batch that is a part of a step; returns the mean loss, likewise.
    To start with a gradient of 1/B spares the nodes of the mean, a tenth of a small model's step. Cross
    entropy takes it as the weight of every class: the first backward that is given a gradient to start
    with imports sympy, a third of a second.
    """
    if not (isinstance(step, Supervised) and step.loss is cross_entropy):
        return _backward(asked(step, model, batch), share)
    x, target = pair(batch)
    output = forward(model, x)
    if not isinstance(output, Tensor) or output.dim() != 2 or target.dim() != 1:
        return _backward(reduce(cross_entropy(output, target)), share)
    each = output.new_full((output.shape[1],), share / len(output))
    value = F.cross_entropy(output, target, each, reduction="sum")
    value.backward()
    return value.detach()


def _backward(values: Tensor, share: float) -> Tensor:
    values.backward(torch.full_like(values, share / values.numel()))
    return values.detach().mean() * share
