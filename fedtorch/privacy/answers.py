"""What a site of another framework answers: weights about those that it was sent, released."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch.privacy.alone import Budget
from fedtorch.types import ConfigError


def answer(
    result: Mapping[str, Any],
    sent: Mapping[str, Any],
    budget: Budget,
    round: int,
    full: bool = True,
) -> dict[str, Tensor]:
    """What may leave in place of ``result``, charged: its names, in the order and types they were sent in.

    ``result`` has the weights that a site trained (``full``) or their changes, ``sent`` those that it was
    sent, arrays or tensors. What is not made of floats comes back as it was sent, as no noise covers it.
    Raises ConfigError, with nothing charged, for what cannot be read or was never sent; OverBudget.
    """
    update = {}
    for name, value in result.items():
        if name not in sent:
            raise ConfigError(f"{name} is in the result, and the server never sent it")
        new, old = _tensor(name, value), _tensor(name, sent[name])
        if new.shape != old.shape:
            raise ConfigError(
                f"{name} has shape {tuple(new.shape)}, and was sent with {tuple(old.shape)}"
            )
        if old.is_floating_point():
            update[name] = new.double() - old.double() if full else new.double()
    released = budget.release(update, round)
    about = {name: _tensor(name, sent[name]) for name in sent if name in result}
    return {
        name: _plus(old if full else torch.zeros_like(old), released.get(name))
        for name, old in about.items()
    }


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray | np.number) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value))
    raise ConfigError(f"{name} is a {type(value).__name__}, not an array of numbers")


def _plus(old: Tensor, change: Tensor | None) -> Tensor:
    """The release on top of what was sent, in its type; what is not made of floats stays as it is."""
    return old if change is None else (old.double() + change).to(old.dtype)
