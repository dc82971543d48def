"""Privacy loss of sampled Gaussian releases on a grid, composed by its Fourier transform (PRV).

Gopi, Lee and Wutschitz 2021 (arXiv:2106.02848): the loss of one release is rounded to a grid, and the loss
of a run is the sum over its releases, so its transform is a product of powers. That product is next to
nothing but at the lowest frequencies, a few hundred of perhaps a million; delta at any epsilon is a
weighted sum over them, and nothing is ever transformed back.

What rounding may do is bounded from above and counted against delta. It is never measured: what one
processor happens to round to nothing, another does not.

A transform rounds to parts of the whole mass, so that a delta of 1e-12 drowns in it. There the masses are
tilted first: each is multiplied by e^(tilt loss), and all by what makes them 1 again, so that most of the
mass lies where delta is decided. Powers of the transform are those of tilted sums, whose tilt is taken off
again, and rounding counts in parts of delta's own size. Any tilt is right; the best is near the Renyi order
of delta, less 1.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fedtorch.privacy.accounting.gaussian import above
from fedtorch.privacy.accounting.mixed import worst_pair

TILTED = 1e-9
"""What frequencies that are left out may add, of tilted mass."""

EPS = float(np.finfo(float).eps)

NOTHING = 1e-30
"""Frequencies that a run multiplies by less are not kept."""


class Release(NamedTuple):
    """One release's privacy loss on a grid of ``size`` places ``mesh`` apart, place 0 worth ``lowest``."""

    mesh: float
    size: int
    first: int
    """Place 0 in steps of the mesh, before the shift that corrects the mean."""
    shift: float
    spectrum: Any
    """Transform of the masses, at the frequencies that are kept."""
    rounding: float
    """Largest error of any frequency, and of a product with it."""
    envelope: Any
    """Logarithm of the largest magnitude at this frequency or any above."""
    tilt: float = 0.0
    scale: float = 0.0
    """Logarithm of the mean of e^(tilt loss), which tilted masses were divided by; without the shift."""


@np.errstate(all="ignore")  # what is beyond the range of floats is checked afterwards
def release(
    noise: float,
    rate: float,
    reach: float,
    mesh: float,
    least: int,
    units: int = 1,
    tilt: float = 0.0,
) -> Release:
    """The loss ln(P / Q) under P when a record is removed, cut off beyond ``reach`` on either side.

    ``least`` is how many such releases are in a run at least: it decides the frequencies to be kept.
    ``units``: several records, or another in its place (``mixed``).
    """
    half = math.ceil(reach / mesh) + 1
    even = 1 << max(0, half.bit_length() - 4)  # a length with a large prime in it takes long
    half = -(-half // even) * even
    size, first, low, high = 2 * half, 1 - half, (1 - half) * mesh, half * mesh
    # at every edge between two places, how likely a larger loss is: 1 below all losses, and 0 far above
    law = _Removed(noise, rate) if units == 1 else worst_pair(noise, rate, units)
    lowest, most = (float(x) for x in law.loss(np.array(law.ends)))
    start = int(max(0.0, (lowest - low) / mesh))
    stop = size if most >= high else min(size, math.ceil((most - low) / mesh) + 2)
    edges = low + mesh * (np.arange(start, stop) - 0.5)
    edges[0] = max(edges[0], low)
    masses = -np.diff(law.beyond(np.append(edges, high)))
    total = float(masses.sum())
    masses /= total
    places = low + mesh * np.arange(start, stop)
    # rounding to the grid may move the mean; all places move back by as much (section 4 of the paper)
    shift = law.mean(low, high) - float(places @ masses)
    if not abs(shift) < mesh / 2:
        raise ValueError("the grid is too coarse or too short for this loss")
    scale, bent = 0.0, 0.0
    if tilt:
        logs = tilt * (places - places[-1])
        masses *= np.exp(logs)
        total = float(masses.sum())
        scale, masses = math.log(total) + tilt * float(places[-1]), masses / total
        bent = EPS * (4 + float(masses @ -logs))  # of powers of e with so large exponents
    pmf = np.zeros(size)
    pmf[start:stop] = masses
    spectrum = np.fft.rfft(pmf)
    # a transform in log2(size) stages, each of which rounds; 2 for the result itself, 1 for its powers. A
    # test holds this to longer numbers
    off = EPS * (3 + math.sqrt(math.log2(size)) * float(np.linalg.norm(pmf))) + bent
    envelope = np.log(np.maximum.accumulate(np.abs(spectrum)[::-1])[::-1])
    kept = int(np.searchsorted(-envelope, -math.log(NOTHING) / least)) + 1
    kept_, logs_ = spectrum[:kept].copy(), envelope[:kept].copy()
    return Release(mesh, size, first, shift, kept_, off, logs_, tilt, scale)


class _Removed(NamedTuple):
    """One record removed: ``mixed`` in closed form."""

    noise: float
    rate: float

    @property
    def ends(self) -> tuple[float, float]:
        return -math.inf, 1 + 12 * self.noise

    def loss(self, z: Any) -> Any:
        return _loss(z, self.noise, self.rate)

    def beyond(self, loss: Any) -> Any:
        return _beyond(loss, self.noise, self.rate)

    def mean(self, low: float, high: float) -> float:
        return _mean(self.noise, self.rate, low, high)


def epsilon_of(
    parts: Sequence[tuple[Release, int]], delta: float, slack: float, start: float
) -> float:
    """Where delta of the sum of the parts' losses, each so many times, is ``delta - slack``, from above.

    All parts are on grids of the same places but for their shifts. Inf where rounding could make up half of
    delta. ``start`` is where to look first.
    """
    tails, lost = _composed(parts, slack)
    if not tails.tilt:
        if 2 * lost > delta:
            return math.inf
        return tails.solve(delta - slack - slack / 1000 - lost, start)
    found = tails.solve(delta - slack, start, lost)
    # what rounding may do counts at its place: there, too, it must be less than half of delta
    return math.inf if 2 * lost * tails.weight(found) > delta else found


def deltas_of(
    parts: Sequence[tuple[Release, int]], slack: float, epsilons: Sequence[float]
) -> list[float]:
    """Delta of the sum of the parts' losses at each epsilon, from above."""
    tails, lost = _composed(parts, slack)
    return [max(0.0, tails.delta(e)) + slack + slack / 1000 + lost for e in epsilons]


def _composed(parts: Sequence[tuple[Release, int]], slack: float) -> tuple["_Tails", float]:
    """Sums over the places of the sum of losses, and what rounding may have taken from them at most."""
    size, mesh, tilt = parts[0][0].size, parts[0][0].mesh, parts[0][0].tilt
    tiny = TILTED if tilt else slack / 1000
    count = _needed(parts, math.log(tiny / size))
    k = np.arange(count)
    product = np.ones(count, complex)
    for one, steps in parts:
        product *= _power(one.spectrum[:count], steps)
    # place i of a sum of t losses is worth t first + i and all their shifts, and the grid is a circle: turn
    # it to where place 0 is worth first again, with what the shifts have over whole places. Shifts of many
    # steps add up to more than the grid is long, and what is worth more than its end counts as less
    steps, first = sum(t for _, t in parts), parts[0][0].first
    shift = sum(one.shift * t for one, t in parts)
    moved = round(shift / mesh)
    product *= _turned(-k * (((steps - 1) * first + moved) % size), size)
    zero = first * mesh + shift - moved * mesh
    # a place's loss before the shifts is what its tilt was made of
    scale = sum(one.scale * t for one, t in parts) + tilt * shift
    tails = _Tails(product, size, mesh, zero, tilt, scale)
    return tails, tails.rounding + tails.most(_off(parts, count)) + (tiny if tilt else 0.0)


def _off(parts: Sequence[tuple[Release, int]], count: int) -> Any:
    """Upper bound on the rounding error of the product at each frequency."""
    sizes = [np.abs(one.spectrum[:count]) + one.rounding for one, _ in parts]
    product = np.exp(sum(t * np.log(m) for (_, t), m in zip(parts, sizes, strict=True)))
    return product * sum(t * one.rounding / m for (one, t), m in zip(parts, sizes, strict=True))


class _Tails:
    """Sums over all places from one on, as sums over frequencies."""

    def __init__(
        self,
        product: Any,
        size: int,
        mesh: float,
        zero: float,
        tilt: float = 0.0,
        scale: float = 0.0,
    ) -> None:
        self.tilt, self.scale = tilt, scale
        k = np.arange(len(product))
        self.k, self.size, self.mesh, self.zero = k, size, mesh, zero
        self.mass = float(product[0].real)
        # frequencies below zero mirror these
        twice = np.where((k == 0) | (2 * k == size), 1, 2) / size
        weighed = product * twice
        weighed[0] = 0  # its sums are written apart
        # sums of w^kj over j from J to the end, and of the same times e^(-mesh (j - J)), are
        # (w^kJ - 1) / (1 - w^k) and (w^kJ - e^(-mesh (size - J))) / (1 - e^-mesh w^k); neither divisor is
        # found by subtracting from 1, to which w^k is close
        angle = 2 * math.pi / size * k
        plain = 2 * np.sin(angle / 2) ** 2 - 1j * np.sin(angle)
        plain[0] = 1
        # tilted sums fall with another e^(-tilt loss)
        first, second = (math.exp(-a * mesh) * plain - math.expm1(-a * mesh) for a in self.falls)
        self.step = twice / np.minimum(np.abs(first), np.abs(second) if tilt else math.inf)
        self.plain, self.falling = weighed / first, weighed / second
        terms = float(np.abs(self.plain).sum() + np.abs(self.falling).sum()) + 2
        self.rounding = 2 * EPS * terms

    @property
    def falls(self) -> tuple[float, float]:
        """By how much a loss that is 1 larger weighs less, as a logarithm, in either of the sums."""
        return self.tilt, self.tilt + 1

    def at(self, place: int) -> tuple[float, float]:
        """Mass from ``place`` on, and the same with e^(-loss) as a weight, times e^(loss at place)."""
        rest = self.size - place
        turn = _turned(self.k * place, self.size)
        even = self.mass / self.size  # what every place would have by frequency 0 alone
        sums = []
        for fall, weights in zip(self.falls, (self.plain, self.falling), strict=True):
            end = math.exp(-fall * self.mesh * rest)
            lone = even * (
                math.expm1(-fall * self.mesh * rest) / math.expm1(-fall * self.mesh)
                if fall
                else rest
            )
            sums.append(lone + float(np.sum(weights * (turn - end)).real))
        weight = self.weight(self.zero + self.mesh * place) if self.tilt else 1.0
        return weight * sums[0], weight * sums[1]

    def weight(self, loss: float) -> float:
        """What a tilted mass at ``loss`` stands for."""
        return math.exp(min(self.scale - self.tilt * loss, 700.0))

    def most(self, off: Any) -> float:
        """By how much any sum of masses can be wrong if each frequency is wrong by ``off``, from above.

        So can delta, whose weights rise from 0 to 1: it is a mean of such sums.
        """
        plain = float(off[0] + 2 * np.sum(off[1:] * self.step[1:]))
        return (
            2 * plain if self.tilt else plain
        )  # two such sums, where the weights of delta fall again

    def delta(self, epsilon: float) -> float:
        """E max(0, 1 - e^(epsilon - loss))."""
        place = min(max(0, math.floor((epsilon - self.zero) / self.mesh) + 1), self.size)
        mass, weighed = self.at(place)
        return mass - math.exp(epsilon - self.zero - self.mesh * place) * weighed

    def solve(self, delta: float, start: float, lost: float = 0.0) -> float:
        """Smallest epsilon, from -1 up, at which E max(0, 1 - e^(epsilon - loss)) is at most ``delta``.

        Newton's method on the logarithm, which is nearly a straight line, until it is within one place of
        the grid, where the equation is solved exactly. ``lost``: of tilted mass, what is added to delta.
        """
        low, high = -1.0, self.zero + self.mesh * (self.size - 2)
        epsilon = min(max(start, low), high)
        for _ in range(200):
            place = max(0, math.floor((epsilon - self.zero) / self.mesh) + 1)
            at = self.zero + self.mesh * place
            mass, weighed = self.at(place)
            # of the place before, which weighs more
            mass += lost * self.weight(at - self.mesh) if lost else 0.0
            found = mass - math.exp(epsilon - at) * weighed
            low, high = (epsilon, high) if found > delta else (low, epsilon)
            if mass > delta and weighed > 0:
                exact = at + math.log((mass - delta) / weighed)
                if at - self.mesh <= exact <= at:
                    return exact
            guess = math.nan
            if found > 0 and weighed > 0:
                slope = math.exp(epsilon - at) * weighed / found
                guess = epsilon + math.log(found / delta) / slope
            epsilon = guess if low < guess < high else (low + high) / 2
            if high - low < 1e-12 * max(1.0, high):
                break
        return high


def _needed(parts: Sequence[tuple[Release, int]], limit: float) -> int:
    """Frequencies below the first from which on all are multiplied by less than e^limit."""
    low, high = 0, min(len(one.spectrum) for one, _ in parts)
    while low < high:
        middle = (low + high) // 2
        small = sum(t * one.envelope[middle] for one, t in parts) < limit
        low, high = (low, middle) if small else (middle + 1, high)
    return max(low, 1)


def _power(x: Any, n: int) -> Any:
    """x^n by squaring: NumPy's own power of complex numbers takes ten times as long."""
    out = None
    while n:
        if n & 1:
            out = x if out is None else out * x
        n >>= 1
        x = x * x if n else x
    return out


def _turned(places: Any, size: int) -> Any:
    """e^(2 pi i places / size), without losing digits of a large number of turns."""
    return np.exp(2j * math.pi / size * (places % size))


def _loss(z: Any, noise: float, rate: float) -> Any:
    """Privacy loss of what lies at ``z``; the record removed is at 1 where it takes part."""
    v = (2 * z - 1) / (2 * noise * noise)
    return np.where(
        v < 1,
        np.log1p(rate * np.expm1(np.minimum(v, 1))),
        np.logaddexp(np.log1p(-rate), math.log(rate) + v),
    )


def _beyond(loss: Any, noise: float, rate: float) -> Any:
    """Probability of a larger loss."""
    possible = loss > np.log1p(-rate)
    ratio = np.log1p(np.expm1(np.where(possible, loss, 0.0)) / rate)
    z = noise * ratio + 0.5 / noise
    return np.where(possible, rate * above(z - 1 / noise) + (1 - rate) * above(z), 1.0)


@lru_cache(maxsize=1)
def _nodes() -> tuple[Any, Any]:
    x, w = np.polynomial.legendre.leggauss(32)
    return x, w


def _mean(noise: float, rate: float, low: float, high: float) -> float:
    """Mean of the losses between ``low`` and ``high``, by Gauss's rule on short pieces."""
    ends = []
    for loss in (low, high):
        inside = loss > np.log1p(-rate)
        z = noise**2 * np.log1p(np.expm1(loss) / rate) + 0.5 if inside else -math.inf
        ends.append(min(max(float(z), -12 * noise), 1 + 12 * noise))
    pieces = math.ceil((ends[1] - ends[0]) / (2 * noise * min(1.0, 2 * noise))) + 1
    cuts = np.linspace(ends[0], ends[1], pieces + 1)
    x, w = _nodes()
    widths = np.diff(cuts)[:, None] / 2
    z = cuts[:-1, None] + widths * (x + 1)
    density = rate * np.exp(-((z - 1) ** 2) / (2 * noise**2)) + (1 - rate) * np.exp(
        -(z**2) / (2 * noise**2)
    )
    weights = density * widths * w
    return float((weights * _loss(z, noise, rate)).sum() / weights.sum())
