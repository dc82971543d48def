"""Weights that begin at zero, as gates and last layers do: until they open, no trial sees behind them.

Two of them one after another hide even that examples mix: at first no gradient has anything of it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedtorch import seeds


@contextmanager
def opened(model: nn.Module) -> Iterator[bool]:
    """The model with such weights moved off zero, and whether it has any; afterwards it is as it was."""
    shut, draw = _shut(model), seeds.generator(0, "gates")
    try:
        with torch.no_grad():
            for p in shut:
                p.copy_(_numbers(p.shape, draw))
        yield bool(shut)
    finally:
        with torch.no_grad():
            for p in shut:
                p.zero_()


def _numbers(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """As a layer's weights are at first; of one axis above zero, as what is rooted or divided by is."""
    if len(shape) < 2:
        return 0.25 + torch.rand(shape, generator=draw)
    return torch.randn(shape, generator=draw) / math.sqrt(shape[1:].numel())


def _shut(model: nn.Module) -> list[Tensor]:
    """Trained weights that are all zero; biases of torch's layers are added, and hide nothing."""
    return [
        p
        for m in model.modules()
        for k, p in m.named_parameters(recurse=False)
        if p.requires_grad and not bool(p.detach().any())
        if not ("bias" in k and type(m).__module__.startswith("torch.nn."))
    ]
