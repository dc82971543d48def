"""What weights and buffers shut out, as gates at first do: until they open, no trial sees behind them.

Two of them one after another hide even that examples mix: at first no gradient has anything of it. Noise
and decay open a gate too that itself has no gradient, as one below zero in a ReLU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedtorch import seeds

Found = TypeVar("Found")

Negative = Callable[[int, torch.Size], Tensor]
"""Place of a gate and its shape -> which of its numbers are below zero."""

LATE = 1_000_000
"""A count of steps that is past all beginnings."""


def behind(
    model: nn.Module, gradient: Tensor, least: float, look: Callable[[], Found | None]
) -> Found | None:
    """What ``look`` finds with gates open, all to one sign and any two to unlike ones; None where nothing.

    ``gradient``: of all trained weights, flat. One of which it has a share below ``least`` may be a gate,
    or stand behind one. Afterwards the model is as it was.
    """
    shut = [*_idle(model, gradient, least), *_off(model)]
    for negative in _negative([t.shape for t in shut]) if shut else ():
        for some in _fewer(shut):
            with _opened(some, negative):
                try:
                    found = look()
                except Exception:  # what means nothing to the model, as a count that is a place
                    continue
            if found:
                return found
            break
    return None


def _fewer(shut: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """All, and what is left where that fails: without counts, and of those the trained alone."""
    sets = [
        [*shut],
        [t for t in shut if t.is_floating_point()],
        [t for t in shut if t.requires_grad],
    ]
    for k, some in enumerate(sets):
        if some and len(some) not in map(len, sets[:k]):
            yield some


def _negative(shapes: Sequence[torch.Size]) -> Iterator[Negative]:
    """Ways to open gates: none below zero, all, and of any two one alone, by binary digits of its place.

    Within a gate it is by turns. A matrix has numbers of both signs at once.
    """
    vectors = [s.numel() for s in shapes if len(s) < 2]
    digits = (len(shapes) - 1).bit_length() if len(vectors) > 1 else 0
    for other in (False, True) if vectors else (False,):
        yield partial(_alike, other)
        for digit in range(digits):
            yield partial(_by_digit, digit, other)
        if max(vectors, default=0) > 1:
            yield partial(_by_turns, other)


def _alike(other: bool, place: int, shape: torch.Size) -> Tensor:
    return torch.full(shape, other)


def _by_digit(digit: int, other: bool, place: int, shape: torch.Size) -> Tensor:
    return torch.full(shape, bool(place >> digit & 1) != other)


def _by_turns(other: bool, place: int, shape: torch.Size) -> Tensor:
    return (torch.arange(shape.numel()) % 2 == other).view(shape)


@contextmanager
def _opened(shut: Sequence[Tensor], negative: Negative) -> Iterator[None]:
    before, draw = [t.detach().clone() for t in shut], seeds.generator(0, "gates")
    try:
        with torch.no_grad():
            for k, t in enumerate(shut):
                if not t.is_floating_point():
                    t.fill_(LATE)
                    continue
                own = _numbers(t.shape, draw)
                t.copy_(torch.where(negative(k, t.shape), -own, own))
        yield
    finally:
        with torch.no_grad():
            for t, was in zip(shut, before, strict=True):
                t.copy_(was)


def _numbers(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """As a layer's weights are at first; of one axis of one sign, as what is rooted or divided by is."""
    if len(shape) < 2:
        return 0.25 + torch.rand(shape, generator=draw)
    return torch.randn(shape, generator=draw) / math.sqrt(shape[1:].numel())


def _idle(model: nn.Module, gradient: Tensor, least: float) -> list[Tensor]:
    """Trained weights with next to no gradient, and zeros, which shut out what has none."""
    params = [p for p in model.parameters() if p.requires_grad]
    parts, whole, biases = (
        gradient.split([p.numel() for p in params]),
        gradient.norm(),
        _biases(model),
    )
    return [
        p
        for p, part in zip(params, parts, strict=True)
        if not bool(part.norm() > least * whole) or (p not in biases and not bool(p.detach().any()))
    ]


def _off(model: nn.Module) -> list[Tensor]:
    """What is not trained and zero, and counts."""
    fixed = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    biases = _biases(model)
    return [
        t
        for t in fixed
        if t not in biases
        and (not bool(t.any()) if t.is_floating_point() else t.numel() == 1 and not t.is_complex())
    ]


def _biases(model: nn.Module) -> set[Tensor]:
    """Those of torch's layers: they are added, and shut nothing out."""
    own = [m for m in model.modules() if type(m).__module__.startswith("torch.nn.")]
    return {p for m in own for k, p in m.named_parameters(recurse=False) if "bias" in k}
