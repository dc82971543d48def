"""Shares: the textbook's, every set of helpers, and what is no share."""

import itertools
import secrets
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtorch.secure import shamir
from fedtorch.secure.refused import Refused


class Given:
    """Coefficients of a textbook."""

    def __init__(self, *numbers):
        self.numbers = [*numbers]

    def randbelow(self, bound):
        return self.numbers.pop(0)


def test_the_textbook():
    shares = shamir.shares(1234, 3, range(6), Given(166, 94), 1613)
    assert [*shares.values()] == [1494, 329, 965, 176, 1188, 775]
    assert shamir.join({k: shares[k] for k in (1, 3, 4)}, 3, 1613) == 1234


def test_the_prime_is_the_first_above_every_secret():
    def prime(n):  # Miller-Rabin with fixed bases
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
            x = pow(base, odd, n)
            if x not in (1, n - 1) and not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
                return False
        return True

    assert [k for k in range(0, 298) if prime(2**256 + k)] == [297]


@pytest.mark.parametrize("n", range(1, 8))
def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not(n):
    for t in range(1, n + 1):
        secret = secrets.randbelow(2**256)
        shares = shamir.shares(secret, t, range(n), secrets)
        for helpers in itertools.combinations(range(n), t):
            assert shamir.join({k: shares[k] for k in helpers}, t) == secret
        with pytest.raises(Refused, match="are needed"):
            shamir.join({k: shares[k] for k in range(t - 1)}, t)
        if t > 1:  # a polynomial of lower degree through one share too few is another
            assert shamir.join({k: shares[k] for k in range(t - 1)}, t - 1) != secret


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.data())
def test_random_helpers(n, data):
    t = data.draw(st.integers(1, n))
    secret = data.draw(st.integers(0, 2**256 - 1))
    shares = shamir.shares(secret, t, range(n), secrets)
    helpers = data.draw(st.permutations(range(n)))[:t]
    found = shamir.combine(shamir.weights(helpers), [shares[k] for k in helpers])
    assert found == secret


@pytest.mark.parametrize("t", [2, 3])
def test_fewer_than_the_threshold_are_distributed_alike_for_every_secret(t):
    prime, n = 17, 4
    for helpers in itertools.combinations(range(n), t - 1):
        seen = []
        for secret in (0, 1, 9, 16):
            counts = Counter()
            for terms in itertools.product(range(prime), repeat=t - 1):
                shares = shamir.shares(secret, t, range(n), Given(*terms), prime)
                counts[tuple(shares[k] for k in helpers)] += 1
            seen.append(counts)
        assert all(s == seen[0] for s in seen)
        assert {*seen[0].values()} == {1}  # each value once: nothing is learnt


def test_two_of_three_shares_tell_nothing_of_any_secret_of_257():
    prime, xs = 257, (1, 2, 3, 4)
    first, second = (c.ravel() for c in np.meshgrid(np.arange(prime), np.arange(prime)))
    for secret in range(prime):
        one, other = (
            shamir._value([first, second, secret], x, prime)
            for x in (xs[secret % 4], xs[(secret + 1) % 4])
        )
        # over all polynomials each pair of values comes once, whatever the secret
        assert (np.bincount(one * prime + other, minlength=prime**2) == 1).all()


def test_a_place_of_numpy_does_not_overflow():
    places = np.arange(5)
    secret = 2**255 + 12345
    shares = shamir.shares(secret, 4, places, secrets)
    assert {type(k) for k in shares} == {int}
    found = shamir.combine(shamir.weights(places[1:]), [shares[k] for k in range(1, 5)])
    assert found == secret


@pytest.mark.parametrize(
    "bad",
    [
        lambda: shamir.weights([0, 1, 1]),
        lambda: shamir.weights([-1, 0]),  # x = 0 would be the secret itself
        lambda: shamir.shares(1, 2, [-1, 0, 1], secrets),
        lambda: shamir.shares(1, 2, [0, 0], secrets),
        lambda: shamir.shares(1, 3, [0, 1], secrets),
        lambda: shamir.shares(1, 0, [0, 1], secrets),
        lambda: shamir.shares(2**256 + 297, 1, [0], secrets),
        lambda: shamir.combine([1], [shamir.PRIME]),
        lambda: shamir.from_bytes((2**256 + 297).to_bytes(33, "big")),
        lambda: shamir.from_bytes(bytes(32)),
        lambda: shamir.join({0: 1}, 2),
    ],
    ids=[
        "twice", "zero", "split at zero", "split twice", "too few", "no threshold", "large secret",
        "large share", "large bytes", "short bytes", "join too few",
    ],
)  # fmt: skip
def test_what_is_no_share_is_refused(bad):
    with pytest.raises(Refused):
        bad()
