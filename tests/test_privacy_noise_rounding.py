"""Rounding at random: right on average, and never longer than what is charged for."""

import math

import numpy as np
import pytest

from fedtorch.privacy.noise.rounding import reach, rounded
from fedtorch.privacy.noise.streams import stream


@pytest.mark.parametrize(
    ("norm", "coordinates", "known"),
    [(64, 16384, 91.214034), (1024, 16384, 1026.528129), (1024, 2**20, 1145.537428)],
)
def test_the_bound_is_that_of_the_paper(norm, coordinates, known):
    assert reach(norm, coordinates) == pytest.approx(known, abs=1e-6)


def coins(k=0):
    return stream("aes", 3, "coins", k)


def test_each_number_becomes_a_neighbour_and_stays_what_it_is_on_average():
    x = np.array([0.25, -0.75, 3.0, -2.0, 1e6 + 0.5, 0.0])
    all_of = np.stack([rounded(x, 2e6, coins(k)) for k in range(4000)])
    assert all_of.dtype == np.int64
    assert (abs(all_of - x) < 1).all()
    assert all_of.mean(0) == pytest.approx(x, abs=5 * 0.5 / math.sqrt(4000))


def test_no_rounding_is_longer_than_the_bound_and_most_are_longer_than_what_was_rounded():
    rng = np.random.default_rng(0)
    norms = []
    for k, d in enumerate((4, 100, 9610) * 5):
        x = rng.normal(size=d)
        x *= 64 / math.sqrt(x @ x)
        q = rounded(x, reach(64, d), coins(k))
        norms.append(math.sqrt(q @ q))
        assert norms[-1] <= reach(64, d)
    # who charges for the norm before rounding charges too little
    assert max(norms) > 64 * 1.15


def test_a_rounding_that_is_too_long_is_done_again():
    x = np.full(400, 0.5)
    for k in range(20):
        q = rounded(x, math.sqrt(190), coins(k))  # half of them would be 200
        assert q @ q <= 190
