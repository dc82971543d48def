"""What a site of another framework answers: weights about those that it was sent, released."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.privacy.alone import Budget
from fedtorch.types import ConfigError

RECEIPT = "released.sha256"
"""In a budget's folder: what private training at this site has released last."""


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
    All that was sent must be there: what a site leaves out may hang on its data. Raises ConfigError, with
    nothing charged, for that, and for what cannot be read or was never sent; OverBudget.
    """
    update = {}
    for name, value in result.items():
        if name not in sent:
            raise ConfigError(f"{name} is in the result, and the server never sent it")
        new, old = tensor(name, value), tensor(name, sent[name])
        if new.shape != old.shape:
            raise ConfigError(
                f"{name} has shape {tuple(new.shape)}, and was sent with {tuple(old.shape)}"
            )
        if old.is_floating_point():
            update[name] = new.double() - old.double() if full else new.double()
    if lacking := [name for name in sent if name not in result]:
        raise ConfigError(
            f"{lacking[0]} was sent and is not in the result: all of it leaves, or nothing"
        )
    released = budget.release(update, round)
    about = {name: tensor(name, value) for name, value in sent.items()}
    return {
        name: _plus(old if full else torch.zeros_like(old), released.get(name))
        for name, old in about.items()
    }


def tensor(name: str, value: Any) -> Tensor:
    """On the CPU; raises ConfigError for what is no array of numbers."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray | np.number) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value))
    raise ConfigError(f"{name} is a {type(value).__name__}, not an array of numbers")


def leave_receipt(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write down what a site's own private training has released last: a filter knows it again."""
    disk.replace(folder / RECEIPT, digest(weights) + "\n")


def has_receipt(folder: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether it is these weights, to the bit."""
    try:
        return disk.regular(folder / RECEIPT).read_text(encoding="utf-8").strip() == digest(weights)
    except (OSError, ValueError):
        return False


def digest(weights: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bits, in any order."""
    made = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        about = [name, str(value.dtype), [*value.shape]]
        made.update(json.dumps(about).encode() + b"\n")
        made.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def _plus(old: Tensor, change: Tensor | None) -> Tensor:
    """The release on top of what was sent, in its type; what is not made of floats stays as it is."""
    return old if change is None else (old.double() + change).to(old.dtype)
