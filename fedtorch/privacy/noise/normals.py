"""Random words to normals (Box & Muller 1958), added to a row of numbers: as machine code, or by NumPy.

A pair of words gives a pair of normals, r cos and r sin of an angle. The first word is the angle, all 64
bits of it; of the second 63 bits are a uniform u in (0, 1], and r = std sqrt(-2 ln u), 9.4 std at most.
Both ways take the same words for the same numbers, which differ by rounding.

The coefficients are fits of ours, printed by ``tools/coefficients.py``; the errors below are what
``tests/test_privacy_noise_normals.py`` finds, with all rounding.
"""

import math

import numpy as np
import torch

from fedtorch.kernels.compile import compiled
from fedtorch.kernels.processor import converts

COS = (
    1.0,
    -1.2337005501361693,
    0.2536695079010322,
    -0.02086348076318458,
    0.0009192602739594559,
    -2.5202039808424532e-05,
    4.7108309942977655e-07,
    -6.382248916379215e-09,
    6.332013622928058e-11,
)
"""cos(pi y / 2) in powers of y^2, for y in [-1, 1]."""

SIN = (
    1.5707963267948966,
    -0.6459640975062442,
    0.07969262624614272,
    -0.004681754135179549,
    0.00016044118433881295,
    -3.5988423672724115e-06,
    5.692070410025574e-08,
    -6.680834069296601e-10,
    5.792209205934274e-12,
)
"""sin(pi y / 2) / y in powers of y^2."""

LOG = (
    0.6666666666666736,
    0.39999999999405483,
    0.28571428744061894,
    0.22222198426151224,
    0.18183571057432849,
    0.15313895728652202,
    0.1479736350587642,
)
"""(2 artanh(f) / f - 2) / f^2 in powers of f^2, for f = (m - 1) / (m + 1), m in [sqrt(1/2), sqrt(2))."""

LN2 = math.log(2)
ROOT = 0x3FE6A09E667F3BCD
"""The bits of sqrt(1/2)."""
EXPONENT = -1 << 52
"""The bits of a float64's sign and exponent."""
SIGN = -1 << 63

LOW = 0x4330000000000000
"""The bits of 2^52, whose last 32 are 0: any other 32 there are that number more."""
HIGH = 0x4530000080000000
"""The bits of 2^84 + 2^63: a signed number's upper half put in by exclusive or is 2^32 times it more."""
MAGIC = 2.0**84 + 2.0**63 + 2.0**52
"""What both are too much."""


Onto = tuple[np.ndarray, float]
"""Numbers of the same type as a row, and what of it is added to them."""


def add(words: np.ndarray, row: np.ndarray, std: float, onto: Onto | None = None) -> None:
    """Add N(0, std^2) to n numbers in place: a sum in float64, rounded to the row's type once.

    ``onto``: n numbers that grow by a factor times that; the row may hold anything then.

    ``words``: n of them, uint64, and one more if n is odd; they are used up. With m = half of them, row[k]
    gets the cosine of words[k] and words[m + k], and row[m + k] the sine.

    Raises ValueError for other than so many: a loop would take what lies behind them in memory.
    """
    if len(words) != len(row) + len(row) % 2:
        raise ValueError(f"{len(row)} normals cannot be made of {len(words)} words")
    if onto is not None and len(onto[0]) != len(row):
        raise ValueError(f"{len(row)} numbers cannot be added to {len(onto[0])}")
    loops = compiled(logarithms, exact=True), compiled(turned, exact=True)
    if not (loops[0] and loops[1]):
        passes(words, row, std)
        if onto is not None:
            torch.from_numpy(onto[0]).add_(torch.from_numpy(row), alpha=onto[1])
        return
    magic, (to, factor) = None if converts() else MAGIC, onto or (None, None)
    loops[0](words[len(words) // 2 :], magic, LOG)
    loops[1](words, row, std, magic, to, factor, COS, SIN)


def way() -> str:
    """How ``add`` does it here."""
    return "a compiled loop" if compiled(turned, exact=True) else "NumPy"


def logarithms(words: np.ndarray, magic: float | None, log: tuple[float, ...]) -> None:
    """Write ln u in place of each word, float64: to be compiled, where four or more go side by side.

    A loop of its own, because a processor looks ahead over so many operations alone, and of one that did
    all it would have too few under way that do not wait for each other.

    ``magic``: MAGIC where a processor has no instruction that converts several whole numbers of 64 bits.
    Their halves are then put into numbers of floating point, which are exact, as is all but the last sum:
    it rounds as the instruction does. ``log``: LOG, which as an argument stays in registers.
    """
    for i in range(len(words)):
        w = np.int64(words[i] >> np.uint64(1))
        if magic is None:
            u = np.float64(w)
        else:
            above = np.int64(np.int64(np.uint64(w) >> np.uint64(32)) ^ HIGH).view(np.float64)
            u = above - magic + np.int64((w & 0xFFFFFFFF) | LOW).view(np.float64)
        u = u * 2.0**-63 + 2.0**-64
        # u = 2^e m with m around 1; x = m - 1 is exact, and 2 f = x - f x keeps digits near u = 1
        bits = np.float64(u).view(np.int64)
        beyond = bits - ROOT
        x = np.int64(bits - (beyond & EXPONENT)).view(np.float64) - 1.0
        f = x / (2.0 + x)
        t = f * f
        g = log[3] + t * (log[4] + t * (log[5] + t * log[6]))
        g = t * (log[0] + t * (log[1] + t * (log[2] + t * g)))
        ln = np.float64(beyond >> 52) * LN2 + (x - f * (x - g))
        words[i] = np.uint64(np.float64(ln).view(np.int64))


def turned(
    words: np.ndarray,
    row: np.ndarray,
    std: float,
    magic: float | None,
    to: np.ndarray | None,
    factor: float | None,
    cos: tuple[float, ...],
    sin: tuple[float, ...],
) -> None:
    """The rest of ``add``, likewise, for angles and logarithms; ``cos`` and ``sin``: COS and SIN."""
    m = len(words) // 2
    pairs, spare = len(row) - m, np.empty(1, row.dtype)
    # each with an index from 0: otherwise the compiler finds no vectors
    left, right, angles, logs = row[:pairs], row[m:], words[:pairs], words[m : m + pairs]
    if to is not None:
        left_to, right_to = to[:pairs], to[m:]
    for lone in range(1 + m - pairs):
        if lone:  # nobody takes the last sine
            left, right, angles, logs = row[pairs:m], spare, words[pairs:m], words[m + pairs :]
            if to is not None:
                left_to, right_to = to[pairs:m], spare
        for i in range(len(left)):
            # half a turn is exact in integers: the top bit and the next say if both coordinates change sign
            a = np.int64(angles[i])
            v = a << 1
            if magic is None:
                y = np.float64(v)
            else:
                above = np.int64(np.int64(np.uint64(v) >> np.uint64(32)) ^ HIGH).view(np.float64)
                y = above - magic + np.int64((v & 0xFFFFFFFF) | LOW).view(np.float64)
            y = y * 2.0**-63
            z = y * y
            c = cos[5] + z * (cos[6] + z * (cos[7] + z * cos[8]))
            c = cos[0] + z * (cos[1] + z * (cos[2] + z * (cos[3] + z * (cos[4] + z * c))))
            s = sin[5] + z * (sin[6] + z * (sin[7] + z * sin[8]))
            s = y * (sin[0] + z * (sin[1] + z * (sin[2] + z * (sin[3] + z * (sin[4] + z * s)))))
            ln = np.int64(logs[i]).view(np.float64)
            r = np.float64(math.sqrt(-2.0 * std * std * ln)).view(np.int64)
            r = np.int64(r ^ ((a ^ (a << 1)) & SIGN)).view(np.float64)
            if to is None:
                left[i] = left[i] + r * c
                right[i] = right[i] + r * s
            else:
                number = left.dtype.type
                left_to[i] = left_to[i] + number(factor) * number(left[i] + r * c)
                right_to[i] = right_to[i] + number(factor) * number(right[i] + r * s)


def passes(words: np.ndarray, row: np.ndarray, std: float) -> None:
    """``add`` by NumPy, a pass over the block for each operation.

    Cosine and sine come from the tangent t of half the angle, for which there is a fast vector form: with
    q = 2 r / (1 + t^2), r sin = q t and r cos = q - r.
    """
    m = len(words) // 2
    t, u = words[:m].view(np.int64) * (math.pi * 2.0**-64), words[m:]
    np.tan(t, out=t)
    np.right_shift(u, np.uint64(1), out=u)
    r = u.view(np.int64) * 2.0**-63  # signed integers are converted faster, hence 63 bits
    np.add(r, 2.0**-64, out=r)  # in (0, 1]: a logarithm of 0 would be infinite
    np.log(r, out=r)
    np.multiply(r, -8 * std * std, out=r)
    np.sqrt(r, out=r)  # 2 r
    q = t * t
    np.add(q, 1, out=q)
    np.divide(r, q, out=q)
    np.multiply(q, t, out=t)
    np.multiply(r, 0.5, out=r)
    np.subtract(q, r, out=q)
    for part, drawn in ((row[:m], q), (row[m:], t[: len(row) - m])):
        part[:] = drawn + part
