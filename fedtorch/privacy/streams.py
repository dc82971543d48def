"""Noise and secret coins: one stream for each client, round and purpose, never used twice.

Seeding matters more than it looks. ``torch.Generator().manual_seed(s)`` keeps only 32 bits of ``s`` on
the CPU, so that among 65,536 streams two are likely the same, and two clients with one stream have
noise that cancels in the difference of their updates. Here the whole 19,968-bit state of the generator
is filled, from the operating system.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

WORDS = 624
HEADER = 24
"""A CPU generator's state: seed, counters (24 bytes), then 624 words of mt19937, 8 bytes each."""


class Stream(Protocol):
    """Randomness for one purpose."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Independent N(0, 1), float64, on the CPU.

        Never float32: a sum in float64 with float32 noise on it shows its low bits, and with them itself.
        """

    def uniform(self, n: int) -> Tensor:
        """Independent uniforms in [0, 1), [n], float64."""


@dataclass(frozen=True)
class TorchStream:
    """The Mersenne Twister of torch with a full random state: fast, and not cryptographic."""

    generator: torch.Generator

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Independent N(0, 1)."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, n: int) -> Tensor:
        """Independent uniforms in [0, 1)."""
        return torch.rand(n, generator=self.generator, dtype=torch.float64)


@dataclass(frozen=True)
class SystemStream:
    """Every draw from the operating system's cryptographic generator (about 40 times slower).

    A normal is the sum of four Box-Muller draws over 2, in float64: the low bits of a single draw would
    tell where the hidden value lies (Mironov 2012; Holohan & Braghin 2021, arXiv:2107.10138). This
    makes that attack impractical; it is no proof against every attack on floating point.
    """

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Independent N(0, 1)."""
        n = math.prod(shape)
        half = 4 * -(-n // 2)
        radius = (-2 * torch.log1p(-self.uniform(half))).sqrt_()
        angle = self.uniform(half).mul_(2 * math.pi)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()])
        return (both.view(4, -1).sum(0)[:n] / 2).view(shape)

    def uniform(self, n: int) -> Tensor:
        """53 random bits each."""
        words = np.frombuffer(os.urandom(8 * n), np.uint64) >> np.uint64(11)
        return torch.from_numpy(words.astype(np.float64) * 2.0**-53)


def stream(rng: str, insecure_seed: int | None, *purpose: str | int) -> Stream:
    """A stream of its own for ``purpose`` (what, round, client).

    With ``insecure_seed`` it is a function of the seed and the purpose, so that a test can repeat it:
    whoever knows the seed can take the noise off again.
    """
    if insecure_seed is not None:
        text = repr((insecure_seed, *purpose)).encode()
        return TorchStream(generator(hashlib.shake_256(text).digest(4 * WORDS)))
    return SystemStream() if rng == "os" else TorchStream(generator(os.urandom(4 * WORDS)))


def generator(entropy: bytes) -> torch.Generator:
    """A torch CPU generator whose whole state is ``entropy`` (2,496 bytes)."""
    fresh = torch.Generator().manual_seed(0)
    state = fresh.get_state()
    words = np.frombuffer(entropy, np.uint32).astype(np.uint64)
    state[HEADER : HEADER + 8 * WORDS] = torch.from_numpy(words.view(np.uint8).copy())
    fresh.set_state(state)
    return fresh


def noised(exact: Tensor, noise: Tensor) -> Tensor:
    """``exact`` + ``noise`` in float64, rounded to float32, returned as float64.

    The rounding is part of the mechanism: low bits that the noise does not reach must not be seen.
    """
    return (noise.to(exact.device) + exact).float().double()
