"""A group of tensors as one vector; whole numbers in as many bits as they need; draws alike everywhere."""

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedtorch.tree import split
from fedtorch.types import Params, Stack


def flat(sent: Stack) -> Tensor:
    """All tensors of each client, in the order of their names, [K, d]."""
    return torch.cat([sent[k].reshape(len(sent[k]), sent[k][0].numel()) for k in sorted(sent)], 1)


def at(sent: Stack, place: Tensor) -> Tensor:
    """Those numbers of ``flat`` that are at these ascending places, [K, k]."""
    found, start = [], 0
    for k in sorted(sent):
        rows = sent[k].reshape(len(sent[k]), sent[k][0].numel())
        a, b = torch.searchsorted(place, torch.tensor([start, start + rows.shape[1]])).tolist()
        found.append(rows.index_select(1, (place[a:b] - start).to(rows.device)))
        start += rows.shape[1]
    return torch.cat(found, 1)


def numbers(like: Mapping[str, Tensor]) -> int:
    """How many there are in all tensors of one client."""
    return sum(v.numel() for v in like.values())


def shaped(rows: Tensor, like: Params) -> Stack:
    """The tensors that ``flat`` made [K, d] of."""
    return split(rows, {k: like[k].shape for k in sorted(like)})


def short(exact: Tensor) -> Tensor:
    """In float32, rounded towards zero: no number gets longer."""
    value = exact.float()
    longer = value.double().abs() > exact.abs()
    return torch.where(longer, value.nextafter(torch.zeros_like(value)), value)


def long(exact: Tensor) -> Tensor:
    """In float32, rounded away from zero."""
    value = exact.float()
    less = value.double().abs() < exact.abs()
    return torch.where(
        less, value.nextafter(torch.copysign(torch.inf * value.new_ones(()), value)), value
    )


def packed(values: Tensor, bits: int) -> Tensor:
    """Whole numbers in [0, 2^bits), [K, n] -> bytes, [K, ceil(n bits / 8)]."""
    of = values.cpu().to(torch.int64).numpy()
    each = ((of[..., None] >> np.arange(bits)) & 1).astype(np.uint8)
    return torch.from_numpy(np.packbits(each.reshape(len(of), -1), axis=1, bitorder="little"))


def unpacked(packs: Tensor, bits: int, count: int) -> Tensor:
    """What ``packed`` was given, [K, count]; raises ValueError for bytes of another length."""
    if packs.dtype != torch.uint8 or packs.shape[1:] != (-(-count * bits // 8),):
        raise ValueError(f"{count} numbers of {bits} bits are not of that many bytes")
    of = np.unpackbits(packs.cpu().numpy(), axis=1, count=count * bits, bitorder="little")
    each = of.reshape(len(of), count, bits).astype(np.int64)
    return torch.from_numpy(each @ (1 << np.arange(bits)))


def uniforms(seed: int, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) by SplitMix64: the same on every machine and of every version."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.asarray((z >> np.uint64(11)) * 2.0**-53)


@lru_cache(maxsize=2)
def places(seed: int, numbers: int, count: int) -> Tensor:
    """``count`` of so many places, ascending; every such set is as likely. Not to be written to.

    Who codes and who decodes in one process draw them once.
    """
    if 2 * count > numbers:
        kept = np.ones(numbers, bool)
        kept[places(seed, numbers, numbers - count).numpy()] = False
        return torch.from_numpy(np.flatnonzero(kept))
    if not count:
        return torch.zeros(0, dtype=torch.int64)
    # as many draws as leave so many different ones, on average, and some more
    drawn = round(-numbers * math.log1p(-count / numbers) + 4 * math.sqrt(count)) + 1
    while True:  # twins count once, and what comes first is as likely as any
        place = (uniforms(seed, drawn) * numbers).astype(np.int64)
        came = np.zeros(numbers, bool)  # marked and not sorted: in a third of the time
        came[place[:count]] = True
        later = place[count:]
        later, first = np.unique(later[~came[later]], return_index=True)
        missing = count - int(np.count_nonzero(came))
        if missing <= len(later):
            came[later[np.argsort(first)[:missing]]] = True
            return torch.from_numpy(np.flatnonzero(came))
        drawn *= 2
