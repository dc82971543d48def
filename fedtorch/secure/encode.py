"""Numbers as whole numbers mod 2^width, and what a client sends as one flat vector of them.

The vector has every group of the upload, the changes of float buffers, and the riders: figures that the
server needs of all together, and must not have of one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from fedtorch.secure.refused import Refused
from fedtorch.types import Params

RANGE = 2.0**15
"""Largest coordinate at width 64, where nothing has to be chosen."""
FINEST = 40
"""Bits behind the point at width 64, up to 255 clients: the mean is off by 2^-41 at most."""
BLOCK = 1 << 14
"""Numbers that stay in a core's cache while they are encoded."""
LOSS = 1024.0
"""Largest loss that rides along."""
RIDERS = ("weight", "examples", "loss", "clamped")
"""What rides at the end: share of the weight cap, examples, share x loss, count of clamped numbers."""


@dataclass(frozen=True)
class Coding:
    """Fixed point for a sum of at most ``clients`` vectors."""

    width: int
    clients: int
    range: float
    scale: int

    @classmethod
    def of(cls, width: int, clients: int, range: float | None = None) -> "Coding":
        """The finest steps whose sum cannot wrap; at width 64 a power of two, at most 2^40.

        Raises Refused where there is no room for a step.
        """
        range = RANGE if range is None else range
        # in fractions: at 64 bits a float would round the last step away
        most = math.floor(
            (Fraction((1 << (width - 1)) - 1, clients) - Fraction(1, 2)) / Fraction(range)
        )
        scale = most if width == 32 else 1 << min(FINEST, max(0, most.bit_length() - 1))
        if most < 1:
            raise Refused("terms", f"{clients} clients with a range of {range:g} need more bits")
        return cls(width, clients, range, scale)

    def encode(
        self, values: np.ndarray, weight: float = 1.0, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, int]:
        """Whole numbers of values [d] times a weight, int64, to nearest even; how many were clamped.

        Raises Refused where one is not finite.
        """
        values = np.asarray(values, np.float64)
        out, beyond = np.empty(len(values), np.int64) if out is None else out, 0
        for at in range(0, len(values), BLOCK):
            part = values[at : at + BLOCK] * weight
            size = np.abs(part)
            top = float(size.max())
            if not math.isfinite(top):
                raise Refused("nonfinite", "an update that is not finite cannot be sent")
            if top > self.range:
                beyond += int(np.count_nonzero(size > self.range))
                part.clip(-self.range, self.range, out=part)
            part *= self.scale
            out[at : at + BLOCK] = np.rint(part, out=part)
        return out, beyond

    def decode(self, sums: np.ndarray) -> np.ndarray:
        """Sums, int64, as numbers, float64."""
        return sums / np.float64(self.scale)


def shortened(
    coding: Coding, values: np.ndarray, norm: float, apart: tuple[slice, ...] = ()
) -> np.ndarray:
    """Values [d] scaled down, where need be, to a length that rounding takes no further than ``norm``.

    ``apart``: what has noise of its own is not in that length; it is rounded towards zero.
    """
    long, bits = values.copy(), [(at, values[at]) for at in apart]
    for at, _ in bits:
        long[at] = 0
    count = len(values) - sum(len(v) for _, v in bits)
    most = max(0.0, norm - math.sqrt(count) / (2 * coding.scale))
    length = math.sqrt(float(long @ long))
    long *= most / length if length > most else 1.0
    for at, own in bits:
        long[at] = np.trunc(own * coding.scale) / coding.scale
    return long


def largest_whole(width: int, clients: int) -> int:
    """The largest whole number of which so many do not wrap."""
    return ((1 << (width - 1)) - 1) // clients


@dataclass(frozen=True)
class Layout:
    """Where what stands in the vector: the same for whoever knows the model, the strategy and the plan."""

    parts: tuple[tuple[str, str, tuple[int, ...]], ...]
    """Group, name and shape, in their order; the group of float buffers is ``BUFFERS``."""

    @classmethod
    def of(
        cls,
        sent: Mapping[str, Mapping[str, tuple[int, ...]]],
        buffers: Mapping[str, tuple[int, ...]],
    ) -> "Layout":
        """By names and shapes, one client's; the order is that of names, not of dictionaries."""
        groups = {**sent, BUFFERS: buffers}
        return cls(
            tuple(
                (g, name, tuple(groups[g][name]))
                for g in sorted(groups)
                for name in sorted(groups[g])
            )
        )

    @property
    def values(self) -> int:
        """Coordinates before the riders."""
        return sum(math.prod(shape) for _, _, shape in self.parts)

    @property
    def size(self) -> int:
        """All coordinates."""
        return self.values + len(RIDERS)

    def flat(self, sent: Mapping[str, Params], changes: Params) -> np.ndarray:
        """One client's tensors as a vector, float64, without riders; a buffer that is not there is zero.

        ``changes``: what the visit added to float buffers.
        """
        groups = {**sent, BUFFERS: changes}
        out = np.zeros(self.values)
        for at, group, name, shape in self._places():
            own = groups.get(group, {}).get(name)
            if own is None and group == BUFFERS:
                continue
            if own is None or own.numel() != math.prod(shape):
                raise Refused("message", f"{group} has no {name} of the shape that was agreed")
            out[at : at + own.numel()] = own.detach().reshape(-1).double().cpu().numpy()
        return out

    def places(self, group: str) -> tuple[slice, ...]:
        """Where the numbers of a group stand."""
        return tuple(
            slice(at, at + math.prod(shape)) for at, own, _, shape in self._places() if own == group
        )

    def unflat(self, vector: np.ndarray) -> tuple[dict[str, Params], Params]:
        """A vector without riders as groups and changes of buffers, float64."""
        found: dict[str, Params] = {BUFFERS: {}}
        for at, group, name, shape in self._places():
            part = torch.from_numpy(vector[at : at + math.prod(shape)].copy()).view(shape)
            found.setdefault(group, {})[name] = part
        changes = found.pop(BUFFERS)
        return found, changes

    def _places(self) -> list[tuple[int, str, str, tuple[int, ...]]]:
        found, at = [], 0
        for group, name, shape in self.parts:
            found.append((at, group, name, shape))
            at += math.prod(shape)
        return found


BUFFERS = "\0buffers"
"""Group of the changes of float buffers; no strategy's group is called so."""


@dataclass(frozen=True)
class Figures:
    """What rides along: of one client before it is sealed, of all together after."""

    weight: float
    """Weight over the weight cap, at most 1; of all: their sum."""
    examples: float = 0.0
    loss: float = 0.0
    """Mean loss of the visit; of all: weighed."""
    clamped: int = 0
    """Numbers that were beyond the range; ``seal`` counts them itself."""


def seal(coding: Coding, values: np.ndarray, figures: Figures) -> np.ndarray:
    """One client's vector, int64: its values times its weight, and the riders.

    Raises Refused where a number is not finite or the weight is not in (0, 1].
    """
    if not 0 < figures.weight <= 1:
        raise Refused("message", f"a weight of {figures.weight}: more than 0, and at most 1")
    # into the place where it stays: pages that are touched first take longer than the arithmetic
    out = np.empty(len(values) + len(RIDERS), np.int64)
    _, beyond = coding.encode(values, figures.weight, out[: len(values)])
    out[len(values) :] = riders(coding, figures, beyond)
    return out


def riders(coding: Coding, figures: Figures, beyond: int) -> np.ndarray:
    """One client's figures as they ride, int64; ``beyond``: how many of its numbers were clamped."""
    most = largest_whole(coding.width, coding.clients)
    loss, over = _loss(coding).encode(_finite(figures.weight * figures.loss))
    weight, _ = _weight(coding).encode(np.array([figures.weight]))
    examples = min(round(figures.examples), most)
    clamped = min(beyond + over + (examples < figures.examples), most)
    return np.array([*weight, examples, *loss, clamped], np.int64)


def unseal(coding: Coding, sums: np.ndarray, clients: int) -> tuple[np.ndarray, Figures]:
    """The weighed mean of so many clients' values, float64, and what all their riders come to.

    ``sums``: int64. Raises Refused for a sum that so many clients cannot have, as where masks are left on.
    """
    values, (weight, examples, loss, clamped) = sums[: -len(RIDERS)], sums[-len(RIDERS) :]
    total = float(_weight(coding).decode(weight))
    most = clients * (coding.range * coding.scale + 0.5)
    fits = 0 < total <= clients and min(examples, clamped) >= 0
    if not fits or (len(values) and np.abs(values.astype(np.float64)).max() > most):
        raise Refused(
            "sum", f"no {clients} clients have such a sum: one of them sent no fixed point"
        )
    figures = Figures(
        total, float(examples), float(_loss(coding).decode(loss)) / total, int(clamped)
    )
    return coding.decode(values) / total, figures


def to_words(vector: np.ndarray, width: int) -> np.ndarray:
    """Signed whole numbers as words mod 2^width: uint64, in the same memory, or uint32."""
    return vector.view(np.uint64) if width == 64 else vector.astype(np.uint32)


def from_words(words: np.ndarray) -> np.ndarray:
    """Words mod 2^width as signed whole numbers, int64."""
    return words.view(np.int64 if words.itemsize == 8 else np.int32).astype(np.int64)


def _weight(coding: Coding) -> Coding:
    return Coding.of(coding.width, coding.clients, 1.0)


def _loss(coding: Coding) -> Coding:
    return Coding.of(coding.width, coding.clients, LOSS)


def _finite(loss: float) -> np.ndarray:
    # a visit whose weights are finite may have had one infinite loss: it counts as clamped
    return np.array([loss if math.isfinite(loss) else 2 * LOSS])
