"""Every number of an update in few bits."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtorch.channel.base import Stage, Turn
from fedtorch.channel.vectors import flat, long, numbers, packed, shaped, short, uniforms, unpacked
from fedtorch.options import COUNT, check
from fedtorch.types import ConfigError, Params, Stack


@dataclass(frozen=True, kw_only=True)
class QSGD(Stage):
    """Levels of a norm, rounded at random, unbiased (Alistarh et al. 2017, arXiv:1610.02132, section 3.1).

    Of each ``bucket`` of a group as one vector: |v| as float32 (4 bytes), and of each number one of 2s + 1
    levels in ceil(log2(2s + 1)) bits; no entropy coder follows, and none is counted.
    """

    unbiased: ClassVar[bool] = True

    levels: int = 15
    """s: levels of a number's size, from 0 to the norm."""
    bucket: int | None = 256
    """Numbers that share a norm: fewer are more exact, and cost a norm each; none: all of a group's."""
    feedback: bool = False
    """Must stay off: what is rounded at random is right on average."""

    def __post_init__(self) -> None:
        """Refuse what is no level."""
        check(self, "channel", levels=COUNT, bucket=COUNT)
        if self.feedback:
            raise ConfigError(
                "channel.feedback is not for qsgd, which is right on average: what rounding leaves out can "
                "grow from visit to visit; leave it out, or put topk before it"
            )
        if self.levels > 1 << 15:
            raise ConfigError(f"channel.levels must be at most {1 << 15}, got {self.levels}")

    @property
    def bits(self) -> int:
        """Of a number."""
        return (2 * self.levels).bit_length()

    def coded(self, sent: Stack, turn: Turn) -> Stack:
        """Levels from -s to s as bytes, and norms, [K, buckets]."""
        whole = flat(sent)
        count = whole.shape[1]
        parts = self._parts(whole)
        norm = long(parts.norm(dim=2))
        size = parts.abs() * (self.levels / norm.double()[..., None].clamp(min=1e-300))
        coins = torch.stack([torch.from_numpy(uniforms(s, count)) for s in turn.own])
        level = (size + self._parts(coins.to(size))).floor().clamp(max=self.levels)
        level = (level.copysign(parts) + self.levels).flatten(1)[:, :count]
        return {"level": packed(level, self.bits), "norm": norm}

    def decoded(self, code: Stack, like: Params, turn: Turn) -> Stack:
        """Each level of its bucket's norm."""
        count, norm = numbers(like), code["norm"].double()
        level = unpacked(code["level"], self.bits, count).to(norm) - self.levels
        if not bool((level <= self.levels).all()) or not bool((norm >= 0).all()):
            raise ValueError("a level or a norm is none")
        whole = self._parts(level) * (norm / self.levels)[..., None]
        return shaped(whole.flatten(1)[:, :count], like)

    def _parts(self, whole: Tensor) -> Tensor:
        """[K, d] -> [K, buckets, numbers], zeros at the end."""
        size = self.bucket or whole.shape[1]
        short = math.ceil(whole.shape[1] / size) * size - whole.shape[1]
        return F.pad(whole, (0, short)).view(len(whole), -1, size)


@dataclass(frozen=True, kw_only=True)
class Sign(Stage):
    """Signs and one size, with error feedback: EF-sign (Karimireddy et al. 2019, arXiv:1901.09847, Alg. 1).

    Of each group as one vector p: (|p|_1 / d) sign(p), a bit for each number and 4 bytes.
    """

    def encode(self, sent: Stack) -> Stack:
        """Signs as bytes, of zero plus, and the mean size, [K, 1]."""
        whole = flat(sent)
        return {"plus": packed(whole >= 0, 1), "size": short(whole.abs().mean(1, keepdim=True))}

    def decode(self, code: Stack, like: Params) -> Stack:
        """All of one size."""
        size = code["size"].double()
        if not bool((size >= 0).all()):
            raise ValueError("a size is negative")
        plus = unpacked(code["plus"], 1, numbers(like)).to(size)
        return shaped((2 * plus - 1) * size, like)
