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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtorch.privacy.noise import normals
from fedtorch.privacy.noise.keystream import KEY, Scratch, Words, keystream

BLOCK = 1 << 15
"""Numbers noised at a time: what stays in a core's cache, with their words."""


Onto = tuple[Tensor, float]
"""A flat tensor that a row is added to once it is noised, and the factor by which."""


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
        out, scratch = np.zeros(math.prod(shape)), Scratch()
        for _ in range(self.draws):
            self._onto(out, 1 / math.sqrt(self.draws), scratch)
        return torch.from_numpy(out).view(shape)

    def add(self, row: Tensor, std: float, scratch: Scratch, onto: Onto | None = None) -> bool:
        """Add N(0, std^2) to a flat tensor in place; the sum is float64, and rounded to its type once.

        Returns whether ``onto`` took it in passing: then the row may hold anything.
        """
        if self.draws == 1 and row.device.type == "cpu":
            self._onto(row.numpy(), std, scratch, onto)
            return onto is not None
        for part in row.split(32 * BLOCK):
            noise = self.normal((len(part),)).mul_(std).to(part.device)
            part.copy_(noise.add_(part))
        return False

    def add_part(self, row: Tensor, std: float, scratch: Scratch) -> None:
        """The same; an audit, which reads whole steps, has to know."""
        self.add(row, std, scratch)

    def uniform(self, n: int) -> Tensor:
        """Independent uniforms in [0, 1), [n], float64, 53 random bits each."""
        return torch.from_numpy(self.uniforms(n, Scratch()))

    def uniforms(self, n: int, scratch: Scratch) -> np.ndarray:
        """The same for one after another."""
        return (self.words(n, scratch) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _onto(
        self, row: np.ndarray, std: float, scratch: Scratch, onto: Onto | None = None
    ) -> None:
        to, factor = (onto[0].numpy(), onto[1]) if onto else (None, 0.0)
        for i in range(0, len(row), BLOCK):
            part, here = row[i : i + BLOCK], None if to is None else (to[i : i + BLOCK], factor)
            normals.add(self.words(len(part) + len(part) % 2, scratch), part, std, here)


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
