"""Noise and secret coins: one stream for each client, round and purpose, never used twice.

Three traps of floating point decide how normals are made here. A float32 uniform has 2^-24 as its
smallest step, so that Box-Muller on it (``torch.randn``) never exceeds 5.77 standard deviations: over
200,000 coordinates and some thousand steps that gap alone outweighs a delta of 1e-5. Noise of 24 bits on a
finer sum shows its low bits, and with them itself. And ``torch.Generator().manual_seed(s)`` keeps 32
bits of ``s``, so that two clients' noise may be the same. Hence: 256-bit keys, 63-bit uniforms (9.3
standard deviations), float64 throughout, and rounding only after the noise is on.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedtorch.privacy.keystream import KEY, Scratch, Words, keystream

BLOCK = 1 << 15
"""Pairs of normals made at a time: what stays in a core's cache."""


@dataclass(frozen=True)
class Work:
    """Memory for one block, to be used again and again: fresh pages would cost as much as the noise."""

    cosine: np.ndarray = field(default_factory=lambda: np.empty(BLOCK))
    sine: np.ndarray = field(default_factory=lambda: np.empty(BLOCK))
    part: np.ndarray = field(default_factory=lambda: np.empty(BLOCK))
    scratch: Scratch = field(default_factory=Scratch)


@dataclass(frozen=True)
class Stream:
    """Randomness for one purpose."""

    words: Words
    """n -> n random 64-bit words."""
    draws: int = 1
    """Normals summed for each that is given out. With four, whoever sees the sum cannot tell from its low
    bits where a single draw lies (Mironov 2012; Holohan & Braghin 2021, arXiv:2107.10138); that makes
    the attack impractical, and is no proof against every attack on floating point."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Independent N(0, 1), float64, on the CPU."""
        out, work = np.empty(math.prod(shape)), Work()
        for part in blocks(out):
            for drawn, into in zip(
                self.pairs(-(-len(part) // 2), 1.0, work), halves(part), strict=True
            ):
                into[:] = drawn[: len(into)]
        return torch.from_numpy(out).view(shape)

    def add(self, row: Tensor, std: float, work: Work) -> None:
        """Add N(0, std^2) to a flat tensor in place; the sum is float64, and rounded to its type once."""
        if row.device.type != "cpu":
            noise = self.normal((len(row),)).mul_(std).to(row.device)
            row.copy_(noise.add_(row))
            return
        for part in blocks(row.numpy()):
            for drawn, into in zip(
                self.pairs(-(-len(part) // 2), std, work), halves(part), strict=True
            ):
                exact = drawn[: len(into)]
                wide = work.part[: len(into)]  # free again, and faster than adding two types
                np.copyto(wide, into)
                np.add(exact, wide, out=exact)
                np.copyto(into, exact, casting="same_kind")

    def uniform(self, n: int) -> Tensor:
        """Independent uniforms in [0, 1), [n], float64, 53 random bits each."""
        return torch.from_numpy(
            (self.words(n, Scratch()) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        )

    def pairs(self, m: int, std: float, work: Work) -> tuple[np.ndarray, np.ndarray]:
        """Two times ``m`` normals, at most BLOCK each, in ``work``'s memory unless several are summed."""
        if self.draws == 1:
            return box_muller(self.words, m, std, work)
        left, right = np.zeros(m), np.zeros(m)
        for _ in range(self.draws):
            one, other = box_muller(self.words, m, std / math.sqrt(self.draws), work)
            left += one
            right += other
        return left, right


def box_muller(words: Words, m: int, std: float, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """2m random words -> two times m normals, float64 (Box & Muller 1958).

    r = std sqrt(-2 ln u), and cosine and sine of an angle from the tangent t of its half, for which there
    is a fast vector form: with q = 2 r / (1 + t^2), r sin = q t and r cos = q - r.
    """
    c, s, q = (w[:m] for w in (work.cosine, work.sine, work.part))
    np.multiply(words(m, work.scratch).view(np.int64), math.pi * 2.0**-64, out=s)
    np.tan(s, out=s)
    first = words(m, work.scratch)  # signed integers are converted faster, hence 63 bits
    np.right_shift(first, np.uint64(1), out=first)
    np.multiply(first.view(np.int64), 2.0**-63, out=c)
    np.add(c, 2.0**-64, out=c)  # in (0, 1]: a logarithm of 0 would be infinite
    np.log(c, out=c)
    np.multiply(c, -8 * std * std, out=c)
    np.sqrt(c, out=c)  # 2 r
    np.multiply(s, s, out=q)
    np.add(q, 1, out=q)
    np.divide(c, q, out=q)
    np.multiply(q, s, out=s)
    np.multiply(c, 0.5, out=c)
    np.subtract(q, c, out=c)
    return c, s


def blocks(row: np.ndarray) -> Iterator[np.ndarray]:
    """A row in pieces of two blocks at most."""
    return (row[i : i + 2 * BLOCK] for i in range(0, len(row), 2 * BLOCK))


def halves(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first half, the longer one if they differ, and the rest."""
    half = -(-len(part) // 2)
    return part[:half], part[half:]


def stream(rng: str, insecure_seed: int | None, *purpose: str | int) -> Stream:
    """A stream of its own for ``purpose`` (what, round, client); ``rng`` is aes or os.

    With ``insecure_seed`` it is a function of the seed and the purpose, so that a test can repeat it:
    whoever knows the seed can take the noise off again.
    """
    if insecure_seed is not None:
        text = repr((insecure_seed, *purpose)).encode()
        return Stream(keystream(hashlib.shake_256(text).digest(KEY)))
    return Stream(system, draws=4) if rng == "os" else Stream(keystream(os.urandom(KEY)))


def system(n: int, scratch: Scratch) -> np.ndarray:
    """Words from the operating system's cryptographic generator, about 20 times slower."""
    return np.frombuffer(bytearray(os.urandom(8 * n)), np.uint64)


def noised(exact: Tensor, noise: Tensor) -> Tensor:
    """``exact`` + ``noise`` in float64, rounded to float32, returned as float64.

    The rounding is part of the mechanism: low bits that the noise does not reach must not be seen.
    """
    return (noise.to(exact.device) + exact).float().double()
