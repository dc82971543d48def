"""Skellam noise: tables that are exact to the last of 128 bits, and draws that are what the tables say."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import special, stats

from fedtorch.privacy.noise.skellam import BITS, farthest, table
from fedtorch.privacy.noise.streams import stream

DRAWS = 400_000


def draws(variance, n=DRAWS, seed=1):
    return table(variance).draw(n, stream("aes", seed, "x").words)


def cuts(variance):
    t = table(variance)
    return [(int(h) << 64) | int(low) for h, low in zip(t.high, t.low, strict=True)]


def pmf(variance, reach):
    return special.ive(abs(np.arange(-reach, reach + 1)), float(variance))


def fits(x, variance):
    """p-value of a chi-square over the numbers that are due ten times or more."""
    p = pmf(variance, 60)
    reach = int(np.flatnonzero(p * len(x) >= 10)[-1]) - 60
    p = p[60 - reach : 61 + reach]
    seen = np.bincount(x[abs(x) <= reach] + reach, minlength=len(p))
    seen = np.append(seen, len(x) - seen.sum())
    return stats.chisquare(seen, len(x) * np.append(p, 1 - p.sum())).pvalue


@pytest.mark.parametrize("variance", [Fraction(1, 2), 9, 150], ids=str)
def test_cumulative_probabilities_are_exact_to_one_in_2_to_the_128(variance):
    found, end = cuts(variance), table(variance).end
    with mpmath.workdps(60):
        mu = mpmath.mpf(variance.numerator) / variance.denominator
        p = [mpmath.exp(-mu) * mpmath.besseli(k, mu) for k in range(end + 40)]
        for k in range(1, end + 1):
            beyond = mpmath.fsum(p[k:])
            assert abs(beyond * 2**BITS - found[end - k]) <= 1
            assert abs((1 - beyond) * 2**BITS - found[end + k - 1]) <= 1
        assert mpmath.fsum(p[end + 1 :]) * 2**BITS < 1  # what lies beyond the ends


def test_the_error_that_is_stated_holds_and_float64_sums_would_be_worse_by_twelve_digits():
    variance, t = 150, table(150)
    p = np.diff([0, *cuts(variance), 1 << BITS])
    assert t.error == pytest.approx((2 * t.end + 2) / 2**BITS)
    assert p.min() >= 0 and sum(p) == 1 << BITS
    exact = [int(x) for x in p]
    rough = np.cumsum(pmf(variance, t.end))
    rough = [int(Fraction(float(x)) * 2**BITS) for x in rough]
    worse = sum(abs(a - b) for a, b in zip(np.diff([0, *rough]), exact, strict=True)) / 2 ** (
        BITS + 1
    )
    assert worse > 1e12 * t.error


@pytest.mark.parametrize("variance", [Fraction(1, 2), 4, 900], ids=str)
def test_moments(variance):
    x = draws(variance).astype(float)
    mu = float(variance)
    assert abs(x.mean()) < 5 * (mu / DRAWS) ** 0.5
    assert x.var() == pytest.approx(mu, rel=0.012)
    assert stats.kurtosis(x, fisher=False) == pytest.approx(3 + 1 / mu, rel=0.03)


def test_draws_follow_the_probabilities_and_shares_add_up_to_the_whole():
    assert fits(draws(4), 4) > 1e-4
    shares = sum(draws(Fraction(4, 5), seed=k) for k in range(5))
    assert fits(shares, 4) > 1e-4
    assert fits(np.rint(np.random.default_rng(0).normal(0, 2, DRAWS)).astype(int), 4) < 1e-9
    assert fits(sum(draws(Fraction(4, 5), seed=k) for k in range(4)), 4) < 1e-9  # a share too few


def test_draws_are_whole_numbers_repeatable_and_of_another_stream_others():
    one, again, other = draws(9, 1000), draws(9, 1000), draws(9, 1000, seed=2)
    assert one.dtype == np.int64
    assert (one == again).all() and (one != other).mean() > 0.5


class Words:
    """Words that are given, in the same memory each time, as of a keystream."""

    def __init__(self, *words):
        self.left, self.memory = list(words), np.empty(8, np.uint64)

    def __call__(self, n, scratch):
        self.memory[:n], self.left = self.left[:n], self.left[n:]
        return self.memory[:n]


def test_the_ends_of_the_table_and_a_tie():
    t, most = table(9), 2**64 - 1
    # nothing is below the first entry but the end itself, nothing above the last
    assert t.draw(2, Words(0, most, 0, most)).tolist() == [-t.end, t.end]
    middle = t.end  # P(X < 0) and what it is in words
    high, low = int(t.high[middle - 1]), int(t.low[middle - 1])
    assert t.draw(1, Words(high, low - 1)).tolist() == [-1]
    assert t.draw(1, Words(high, low)).tolist() == [0]
    words = Words(
        high, high + 1, high, low, low - 1
    )  # two ties: the words after those of the block
    assert t.draw(3, words).tolist() == [0, 0, -1]
    assert not words.left


def test_a_wide_table_is_quick_to_make_and_no_noise_is_refused():
    assert table(1000**2).end == pytest.approx(13 * 1000, rel=0.02)
    for variance in (1, 9, 150, 1000**2):  # what is known of its end without making it
        assert table(variance).end <= farthest(variance) <= 1.1 * table(variance).end + 1
    with pytest.raises(ValueError, match="none"):
        table(0)
