"""Whether what a loss makes of an example hangs on the others of its batch, tried on outputs alone.

That costs next to nothing however large the model is, so that batches may be as large as the largest of a
run, of one class after the other, and of all classes at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtorch import seeds
from fedtorch.training.losses import Loss, reduce
from fedtorch.tree import filled, leaves, mapped, rows, size

WATCHED = 4
"""Examples that are looked at, alone and in company."""

SCALES = (1.0, 30.0, 1e3, 1e6)
"""Inputs, and outputs, are tried so many times as large."""

CLASSES = 32
"""Classes of which a batch each is tried, spread over those there are."""

LARGEST_BATCH = 2048
"""Examples beyond which no batch is tried: a loss of pairs has a number for each two of them."""

LARGE = 512
"""The same where outputs are made larger."""

MOST_OUTPUTS = 1 << 22
"""Numbers that the outputs of the largest batches may have, of all classes together."""


class Near(NamedTuple):
    """How far numbers may be apart that are to be the same."""

    rtol: float
    atol: float


class Batch(NamedTuple):
    """Rows of an output, with labels; the first ``watched`` of them are tried alone, too."""

    places: Tensor
    labels: Any
    watched: int


def meets(
    loss: Loss, output: Any, y: Any, near: Near, many: int, scales: tuple[float, ...] = SCALES
) -> bool:
    """Whether examples reach one another in batches of up to ``many``, by value or by gradient.

    ``output`` and ``y`` are of a few examples. Outputs are replaced by noise, which may be no numbers
    that the loss takes (probabilities, for one): where it raises, nothing is found.
    """
    draw = seeds.generator(0, "outputs")
    noise = [
        torch.randn(t.shape, generator=draw).to(t) if t.is_floating_point() else t
        for t in leaves(output)
    ]
    for scale in scales:
        given = filled(output, [scale * t if t.is_floating_point() else t for t in noise])
        limits = (LARGEST_BATCH, CLASSES) if scale == 1 else (LARGE, 2)
        with tolerant(0.0):
            for few in _batches(output, y, min(many, limits[0]), limits[1]):
                if _differs(loss, given, size(y), few, near):
                    return True
    return False


def _batches(output: Any, y: Any, many: int, most: int) -> Iterator[list[Batch]]:
    """As labels are, few and many; each of at most ``most`` classes by itself; all classes by turns.

    Batches that come together begin with the same examples, the last with all that are watched.
    """
    n, room = size(y), MOST_OUTPUTS // max(1, sum(t[:1].numel() for t in leaves(output) if t.dim()))
    both = torch.arange(n), _tiled(n, min(many, room))
    yield [Batch(places, rows(y, places), WATCHED) for places in both]
    each = _each_class(output, y, most)
    both = torch.arange(-(-n // 2)), _tiled(n, min(many, room // len(each)))
    for label in each:
        yield [Batch(places, rows(label, torch.zeros_like(places)), 2) for places in both]
    if classes := _classes(output, y, most):
        places = _tiled(n, max(min(many, room), 2 * len(classes)))
        turns = torch.tensor(classes)[torch.arange(len(places)) % len(classes)].to(y)
        turns = turns.view(-1, *[1] * (y.dim() - 1)).expand(-1, *y.shape[1:])
        yield [Batch(places, turns, len(classes))]


def _tiled(n: int, many: int) -> Tensor:
    return torch.arange(max(many, n)) % n


def _each_class(output: Any, y: Any, most: int) -> list[Any]:
    """A label of each class, as a batch of one; those of the first two examples where none are known."""
    if classes := _classes(output, y, most):
        return [y.new_full((1, *y.shape[1:]), c) for c in classes]
    return [rows(y, torch.tensor([k])) for k in range(min(2, size(y)))]


def _classes(output: Any, y: Any, most: int) -> list[int]:
    """Classes that an output of logits has, spread evenly if there are many; none: there are no classes."""
    first = next(iter(leaves(output)), None)
    if first is None or not isinstance(y, Tensor) or y.is_floating_point():
        return []
    if first.dim() < 2 or (first.shape[0], *first.shape[2:]) != y.shape or first.shape[1] < 2:
        return []
    count = first.shape[1]
    return sorted({*torch.linspace(0, count - 1, min(count, most)).long().tolist()})


def _differs(loss: Loss, given: Any, n: int, batches: list[Batch], near: Near) -> bool:
    """Whether a watched example's loss, or the gradient by its outputs, is another in company."""
    last = batches[-1]
    one = [torch.tensor([k]) for k in range(min(last.watched, len(last.places)))]
    alone = [_slope(loss, given, n, last.places[k], rows(last.labels, k)) for k in one]
    for batch in batches:
        values, slopes = _slope(loss, given, n, batch.places, batch.labels)
        if len(values.shape) != 1 or len(values) != len(batch.places):
            if any(a.dim() for a, _ in alone):
                return True  # alone it had a number of its own
            continue
        watched = min(batch.watched, len(values))
        own = torch.stack([value.flatten()[:1] for value, _ in alone[:watched]])
        own_slopes = torch.cat([slope for _, slope in alone[:watched]])
        if far(own, values[:watched, None], near) or far(own_slopes, slopes[:watched], near):
            return True
    return False


def _slope(loss: Loss, output: Any, n: int, index: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    """Losses of some of ``n`` rows, and the gradient of their sum by those rows, [rows, numbers]."""

    def row(t: Tensor) -> Tensor:
        part = t[index].detach() if t.dim() and len(t) == n else t.detach()
        return part.requires_grad_() if part.is_floating_point() else part

    with torch.enable_grad():
        part = mapped(row, output)
        losses = reduce(loss(part, y))
        given = [t for t in leaves(part) if t.requires_grad and t.dim() and len(t) == len(index)]
        found: Sequence[Tensor | None] = [None] * len(given)
        if losses.requires_grad and given:
            found = torch.autograd.grad(losses.sum(), given, allow_unused=True)
    slopes = [
        (torch.zeros_like(t) if g is None else g).reshape(len(index), -1)
        for t, g in zip(given, found, strict=True)
    ]
    return losses.detach(), torch.cat([losses.new_zeros(len(index), 0), *slopes], 1)


def far(one: Tensor, other: Tensor, near: Near) -> bool:
    """Whether rows of numbers are apart, by their length; what is not finite is held to nothing."""
    one, other = one.double(), other.double()
    own, apart = one.norm(dim=1), (other - one).norm(dim=1)
    return bool(((own < float("inf")) & ~(apart <= near.rtol * own + near.atol)).any())


@contextmanager
def tolerant(scale: float) -> Iterator[None]:
    """What a model or loss does not take is no sign of mixing, unless it is the data's own size."""
    try:
        yield
    except Exception:
        if scale == 1:
            raise
