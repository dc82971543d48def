"""Skellam noise, the difference of two equal Poisson numbers, drawn from a table of whole numbers.

Sums of independent shares are Skellam again, exactly. A draw is a uniform number of 128 bits held to the
cumulative probabilities as integers of 128 bits. Sums of probabilities in float64 would not do: each is
off by up to 2^-53, so that a run of a billion numbers would differ from Skellam noise by more than a delta
of 1e-5 allows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np

from fedtorch.privacy.noise.keystream import Scratch, Words

BITS = 128
"""Of each cumulative probability, and of the uniform number that is held to it."""

BLOCK = 1 << 15
"""Numbers drawn at a time."""

SPARE = 192
"""Bits of the first number of the recurrence: what rounding takes off is far below 2^-BITS."""

SPARE_TAIL = 40
"""The recurrence starts where the tail is so many bits below the last entry's."""


@dataclass(frozen=True, eq=False)
class Cumulative:
    """Cumulative probabilities from ``-end`` on, 2 ``end`` of them, each as two words of 64 bits."""

    high: np.ndarray
    """The upper halves, uint64, rising."""
    low: np.ndarray
    """The lower halves."""
    end: int
    """No number drawn is farther from 0: farther ones have a chance below 2^-BITS together."""

    @property
    def error(self) -> float:
        """Total variation between a number drawn and Skellam noise, at most."""
        return (2 * self.end + 2) * 2.0**-BITS

    def draw(self, n: int, words: Words) -> np.ndarray:
        """``n`` independent numbers, int64: one word each, and the next one where a word alone is a tie."""
        out, scratch = np.empty(n, np.int64), Scratch()
        for i in range(0, n, BLOCK):
            part = out[i : i + BLOCK]
            word = words(len(part), scratch)
            part[:] = np.searchsorted(self.high, word, side="right")
            # at place 0 the last entry is looked at, which no word so small equals
            ties = np.flatnonzero(self.high[part - 1] == word)
            for j, tied in zip(
                ties, word[ties], strict=True
            ):  # a copy: words come in the same memory
                part[j] = self._settled(tied, words(1, scratch)[0])
        return np.subtract(out, self.end, out=out)

    def _settled(self, upper: np.uint64, lower: np.uint64) -> int:
        first = int(np.searchsorted(self.high, upper, side="left"))
        last = int(np.searchsorted(self.high, upper, side="right"))
        return first + int(np.searchsorted(self.low[first:last], lower, side="right"))


@lru_cache(maxsize=8)
def table(variance: int | Fraction) -> Cumulative:
    """The table of Skellam noise with this variance, exact as it is given; raises ValueError for none."""
    if variance <= 0:
        raise ValueError(f"noise of variance {variance} is none")
    tails = _tails(_weights(Fraction(variance)))
    below = tails[::-1]  # of -end, ..., -1
    above = [(1 << BITS) - t for t in tails]  # of 0, ..., end - 1
    raw = b"".join(c.to_bytes(BITS // 8, "little") for c in [*below, *above])
    halves = np.frombuffer(raw, "<u8").reshape(-1, 2)
    return Cumulative(halves[:, 1].astype(np.uint64), halves[:, 0].astype(np.uint64), len(tails))


def _tails(weights: Sequence[int]) -> list[int]:
    """P(X >= k) for k = 1, 2, ... in units of 2^-BITS, as long as it is one at least."""
    beyond = list(accumulate(reversed(weights)))[::-1]  # sum over j >= k
    whole = beyond[0] + beyond[1]
    tails = ((b << BITS) // whole for b in beyond[1:])
    return [t for t in tails if t]


def _weights(variance: Fraction) -> list[int]:
    """Numbers in the proportion of P(X = k), k = 0, 1, ..., to a place beyond which nothing counts.

    They are Bessel functions I_k(variance), by their recurrence I_{k-1} = I_{k+1} + (2 k / variance) I_k,
    from the far end (Miller's way): there every term is positive, and what the start lacks dies out.
    """
    top, bottom = variance.as_integer_ratio()
    found = [0, 1 << SPARE]
    for k in range(_passed(float(variance), BITS + SPARE_TAIL), 0, -1):
        found.append(found[-2] + 2 * k * bottom * found[-1] // top)
    return found[::-1]


def farthest(variance: float) -> int:
    """No number drawn is farther from 0: the end of a table, or a little more, without making it."""
    return _passed(variance, BITS + 1)


def _passed(variance: float, bits: int) -> int:
    """A place that numbers are beyond with a chance below 2^-bits, by Chernoff's bound."""
    limit = bits * math.log(2)

    def beyond(k: int) -> bool:
        return k * math.asinh(k / variance) - (math.hypot(k, variance) - variance) > limit

    high = 1
    while not beyond(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high
