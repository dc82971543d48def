"""Whether a site's model is the server's: a plan names it alone, and each side builds it by its own file.

The server says how its weights are laid out, and what the model gives for weights and inputs that both make
by a rule. Another layer between the same weights would train without a word, and towards nothing.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.training.module import forward
from fedtorch.training.outline import copied
from fedtorch.types import ConfigError

PERIOD = 997
"""Numbers after which the rule begins anew."""
SHOWN = 16
"""Outputs that are told, of two examples."""
NEAR = 1e-3
"""How far apart they may be, by the largest: processors round each in their own way."""


def shown(model: nn.Module, shape: Sequence[int] | None) -> dict[str, Any]:
    """What the server tells of its model; where its output hangs on chance, or fails, the layout alone."""
    given = [outputs(model, shape) for _ in range(2)] if shape else [None]
    same = given[0] is not None and given[0] == given[-1]
    return {"layout": layout(model), "gives": given[0] if same else None}


def check(model: nn.Module, name: str, shape: Sequence[int] | None, told: Any) -> None:
    """Raises ConfigError where this site's model is another than the server has ``told`` of."""
    if not isinstance(told, dict):  # a server of an older version
        return
    fix = f"this site's model {name} is another than the server's: "
    if told.get("layout") != layout(model):
        raise ConfigError(
            f"{fix}its weights have other names, shapes or types; take the server's file"
        )
    theirs = told.get("gives")
    if not (isinstance(theirs, list) and all(type(v) is float for v in theirs) and shape):
        return
    ours = outputs(model, shape)
    most = max([abs(v) for v in theirs], default=0.0)
    if ours is None or len(ours) != len(theirs) or not _near(ours, theirs, most):
        raise ConfigError(
            f"{fix}of the same weights and inputs it makes something else; take the server's file"
        )


def layout(model: nn.Module) -> str:
    """Digest of names, shapes and types of all that the model saves."""
    rows = sorted((k, str(v.dtype), [*v.shape]) for k, v in model.state_dict().items())
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def outputs(model: nn.Module, shape: Sequence[int] | None) -> list[float] | None:
    """The first numbers that a copy of the model gives in evaluation, by the rule; None where it fails."""
    if shape is None:
        return None
    try:
        with torch.no_grad(), seeds.seeded(0):
            made = copied(model).eval()
            _ruled(made)
            try:
                found = forward(made, _rule(torch.zeros(2, *shape), 0))
            except Exception:  # it takes places in a table
                found = forward(made, torch.arange(2 * math.prod(shape)).view(2, *shape) % 2)
            numbers = found.double().flatten()[:SHOWN]
    except (
        Exception
    ):  # what a model of its owner's may raise; its training says so, if that fails too
        return None
    return [float(v) for v in numbers] if bool(numbers.isfinite().all()) else None


def _ruled(model: nn.Module) -> None:
    """Give all weights, and the buffers that are saved, numbers by the rule; variances stay positive."""
    own = {k for k, _ in model.named_parameters()}
    for k, (name, value) in enumerate(sorted(model.state_dict(keep_vars=True).items())):
        if value.is_floating_point():
            value.copy_(_rule(value, k) * 0.2 if name in own else 1 + _rule(value, k) / 4)


def _rule(like: Tensor, k: int) -> Tensor:
    """Numbers between -1 and 1, in the shape of another tensor."""
    period = torch.cos(0.7 * torch.arange(PERIOD, dtype=torch.float64) + 1.3 * k)
    count = like.numel()
    return period.repeat(count // PERIOD + 1)[:count].view(like.shape).to(like)


def _near(ours: Sequence[float], theirs: Sequence[float], most: float) -> bool:
    return most < math.inf and all(
        abs(a - b) <= NEAR * most for a, b in zip(ours, theirs, strict=True)
    )
