"""Only some numbers of an update are sent: the largest with their places, or some by a common draw."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtorch.channel.base import Stage, Turn
from fedtorch.channel.vectors import at, flat, numbers, packed, places, shaped, short, unpacked
from fedtorch.options import RATE, check
from fedtorch.types import Params, Stack


def count_of(share: float, numbers: int) -> int:
    """To the nearest, at least one."""
    return max(1, round(share * numbers))


@dataclass(frozen=True, kw_only=True)
class TopK(Stage):
    """The largest numbers with their places, and error feedback (Stich et al. 2018, arXiv:1809.07599).

    Of each group as one vector, Alg. 1: 4 bytes each as float32, and its place in as many bits as a place
    needs, or a bit for every place, whichever is less. Values are rounded towards zero, and what rounding
    leaves out is kept like the rest.
    """

    leads: ClassVar[bool] = True

    share: float = 0.1
    """Of a group's d numbers, k = share x d to the nearest, at least one, are sent."""

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        check(self, "channel", share=RATE)

    def encode(self, sent: Stack) -> Stack:
        """Places in the vector of all tensors, in the order of their names, packed; and values, [K, k]."""
        whole = flat(sent)
        count = count_of(self.share, whole.shape[1])
        place = whole.abs().topk(count, 1).indices.sort(1).values
        return {
            "place": packed_places(place, whole.shape[1]),
            "value": short(whole.gather(1, place)),
        }

    def decode(self, code: Stack, like: Params) -> Stack:
        """Zeros elsewhere."""
        d = numbers(like)
        place, value = (
            unpacked_places(code["place"], d, count_of(self.share, d)),
            code["value"].double(),
        )
        zeros = value.new_zeros(len(value), d)
        return shaped(zeros.scatter_(1, place.to(value.device), value), like)


def packed_places(place: Tensor, numbers: int) -> Tensor:
    """Ascending places [K, k] among so many numbers as bytes: one by one, or a bit for each number."""
    bits, count = bits_of_place(numbers), place.shape[1]
    if count * bits <= numbers:
        return packed(place, bits)
    marks = torch.zeros(len(place), numbers, dtype=torch.uint8, device=place.device)
    return packed(marks.scatter_(1, place, 1), 1)


def unpacked_places(code: Tensor, numbers: int, count: int) -> Tensor:
    """The places [K, k]; raises ValueError for others than ``packed_places`` writes."""
    bits = bits_of_place(numbers)
    if count * bits <= numbers:
        place = unpacked(code, bits, count)
        if not bool((place < numbers).all()):
            raise ValueError("a place is beyond the weights")
        return place
    marks = unpacked(code, 1, numbers)
    if not bool((marks.sum(1) == count).all()):
        raise ValueError("other places are marked than there are values")
    return marks.nonzero()[:, 1].view(len(marks), count)


def bits_of_place(numbers: int) -> int:
    """Bits that a place among so many needs."""
    return max(1, (numbers - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class RandomK(Stage):
    """Numbers at places that all draw alike: codes add up (Stich et al. 2018, arXiv:1809.07599).

    Random-k, of which no place is sent: k of a group's d numbers anew each round. Unbiased, as each counts
    d/k times; with ``feedback`` it is sent as it is, and what is left out is added to the next update.
    """

    linear: ClassVar[bool] = True
    leads: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True

    share: float = 0.1
    """Of a group's d numbers, k = share x d to the nearest, at least one, are sent."""
    feedback: bool = False
    """Clients keep what was left out, and add it to their next update."""

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        check(self, "channel", share=RATE)

    def coded(self, sent: Stack, turn: Turn) -> Stack:
        """Values in the order of their places, [K, k] as float32."""
        d = sum(v[0].numel() for v in sent.values())
        count = count_of(self.share, d)
        value = at(sent, places(turn.common, d, count))
        return {"value": short(value) if self.feedback else (value * (d / count)).float()}

    def decoded(self, code: Stack, like: Params, turn: Turn) -> Stack:
        """Zeros elsewhere."""
        value, d = code["value"].double(), numbers(like)
        place = places(turn.common, d, count_of(self.share, d)).to(value.device)
        zeros = value.new_zeros(len(value), d)
        return shaped(zeros.index_copy_(1, place, value), like)
