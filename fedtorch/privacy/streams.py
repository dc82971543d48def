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

    radius: np.ndarray = field(default_factory=lambda: np.empty(BLOCK))
    tangent: np.ndarray = field(default_factory=lambda: np.empty(BLOCK))
    square: np.ndarray = field(default_factory=lambda: np.empty(BLOCK))
    bottom: np.ndarray = field(default_factory=lambda: np.empty(BLOCK))
    out: np.ndarray = field(default_factory=lambda: np.empty(2 * BLOCK))
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
        n, work = math.prod(shape), Work()
        out = np.empty(n)
        for i in range(0, n, 2 * BLOCK):
            out[i : i + 2 * BLOCK] = self.block(min(2 * BLOCK, n - i), 1.0, work)
        return torch.from_numpy(out).view(shape)

    def add(self, row: Tensor, std: float, work: Work) -> None:
        """Add N(0, std^2) to a flat tensor in place; the sum is float64, and rounded to its type once."""
        if row.device.type != "cpu":
            noise = self.normal((len(row),)).mul_(std).to(row.device)
            row.copy_(noise.add_(row))
            return
        exact: np.ndarray = row.numpy()
        for i in range(0, len(exact), 2 * BLOCK):
            part = exact[i : i + 2 * BLOCK]
            drawn = self.block(len(part), std, work)
            np.add(drawn, part, out=drawn)
            np.copyto(part, drawn, casting="same_kind")

    def uniform(self, n: int) -> Tensor:
        """Independent uniforms in [0, 1), [n], float64, 53 random bits each."""
        return torch.from_numpy(
            (self.words(n, Scratch()) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        )

    def block(self, n: int, std: float, work: Work) -> np.ndarray:
        """``n`` normals, [n], at most 2 BLOCK; a view of ``work`` unless several draws are summed."""
        half = -(-n // 2)
        if self.draws == 1:
            return box_muller(self.words(2 * half, work.scratch), std, work)[:n]
        total = np.zeros(n)
        for _ in range(self.draws):
            words = self.words(2 * half, work.scratch)
            total += box_muller(words, std / math.sqrt(self.draws), work)[:n]
        return total


def box_muller(words: np.ndarray, std: float, work: Work) -> np.ndarray:
    """2m random words -> 2m normals, float64 (Box & Muller 1958).

    r = std sqrt(-2 ln u), and sine and cosine of an angle from the tangent t of its half, for which
    there is a fast vector form: cos = (1 - t^2) / (1 + t^2), sin = 2 t / (1 + t^2).
    """
    m = len(words) // 2
    r, t, q, b = (w[:m] for w in (work.radius, work.tangent, work.square, work.bottom))
    out = work.out[: 2 * m]
    first = words[:m] >> np.uint64(1)  # signed integers are converted faster, hence 63 bits
    np.multiply(first.view(np.int64), 2.0**-63, out=r)
    np.add(r, 2.0**-64, out=r)  # in (0, 1]: a logarithm of 0 would be infinite
    np.log(r, out=r)
    np.multiply(r, -2 * std * std, out=r)
    np.sqrt(r, out=r)
    np.multiply(words[m:].view(np.int64), math.pi * 2.0**-64, out=t)
    np.tan(t, out=t)
    np.multiply(t, t, out=q)
    np.add(q, 1, out=b)
    np.divide(r, b, out=r)
    np.subtract(1, q, out=q)
    np.multiply(r, q, out=out[:m])
    np.add(t, t, out=t)
    np.multiply(r, t, out=out[m:])
    return out


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
    return np.frombuffer(os.urandom(8 * n), np.uint64)


def noised(exact: Tensor, noise: Tensor) -> Tensor:
    """``exact`` + ``noise`` in float64, rounded to float32, returned as float64.

    The rounding is part of the mechanism: low bits that the noise does not reach must not be seen.
    """
    return (noise.to(exact.device) + exact).float().double()
