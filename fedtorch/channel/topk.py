"""Only the largest numbers of an update are sent, with their places."""

from dataclasses import dataclass

import torch

from fedtorch.channel.base import Stage
from fedtorch.options import RATE, check
from fedtorch.tree import split
from fedtorch.types import Params, Stack


@dataclass(frozen=True, kw_only=True)
class TopK(Stage):
    """Top-k sparsification with error feedback (Stich et al. 2018, arXiv:1809.07599, Alg. 1).

    Of each group as one vector the k largest numbers, by size, are sent: 4 bytes each as float32, and 4
    for its place. Values are rounded towards zero, and what rounding leaves out is kept like the rest.
    """

    share: float = 0.1
    """Of a group's d numbers, k = share x d to the nearest, at least one, are sent."""

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        check(self, "channel", share=RATE)

    def encode(self, sent: Stack) -> Stack:
        """Places in the vector of all tensors, in the order of their names, and values, [K, k] each."""
        flat = torch.cat(
            [sent[k].reshape(len(sent[k]), sent[k][0].numel()) for k in sorted(sent)], 1
        )
        count = max(1, round(self.share * flat.shape[1]))
        place = flat.abs().topk(count, 1).indices.sort(1).values
        exact = flat.gather(1, place)
        value = exact.float()
        longer = value.double().abs() > exact.abs()
        value = torch.where(longer, value.nextafter(torch.zeros_like(value)), value)
        return {"place": place.int(), "value": value}

    def decode(self, code: Stack, like: Params) -> Stack:
        """Zeros elsewhere."""
        shapes = {k: like[k].shape for k in sorted(like)}
        place, value = code["place"].long(), code["value"].double()
        numbers = sum(s.numel() for s in shapes.values())
        if not bool(((place >= 0) & (place < numbers)).all()):
            raise ValueError("a place is beyond the weights")
        return split(value.new_zeros(len(value), numbers).scatter_(1, place, value), shapes)
