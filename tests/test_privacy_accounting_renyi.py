"""Renyi divergence against Opacus's, order by order, and the epsilon from it."""

import math
import warnings

import numpy as np
import pytest

from fedtorch.privacy.accounting.renyi import orders, renyi, renyi_epsilon


def test_the_orders_are_opacus_s_and_more() -> None:
    from opacus.accountants import RDPAccountant

    assert list(orders()[: len(RDPAccountant.DEFAULT_ALPHAS)]) == RDPAccountant.DEFAULT_ALPHAS
    assert orders()[-1] == 1024 and list(orders()) == sorted(orders())


@pytest.mark.parametrize(
    ("noise", "rate"),
    [(0.2, 0.3), (0.4, 1e-3), (0.7, 0.95), (1.0, 1 / 6), (1.1, 0.01), (3.0, 0.5), (29.0, 0.2)],
)
def test_every_order_is_opacus_s(noise: float, rate: float) -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    tried = [*orders()[::5], 12.0, 63.0, 256.0]  # Opacus takes long over all of them
    places = np.searchsorted(orders(), tried)
    theirs = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=tried)
    # Opacus stops its series at e^-30 and holds A itself, and so loses digits of A - 1
    assert renyi(noise, rate)[places] == pytest.approx(theirs, rel=1e-8, abs=1e-11)


def test_whole_orders_follow_the_binomial_sum_and_others_lie_between() -> None:
    noise, rate = 0.8, 0.05
    found = dict(zip(orders(), renyi(noise, rate), strict=True))
    for a in (2, 7, 30):
        terms = [
            math.comb(a, i) * rate**i * (1 - rate) ** (a - i) * math.exp((i * i - i) / 2 / noise**2)
            for i in range(a + 1)
        ]
        assert found[a] == pytest.approx(math.log(math.fsum(terms)) / (a - 1), rel=1e-12)
    assert (np.diff(renyi(noise, rate)) > 0).all()  # the divergence rises with its order


def test_tiny_divergences_keep_their_digits() -> None:
    # second order in the rate: a q^2 (e^(1/s^2) - 1) / 2, far below what 1 + x can hold
    for a, found in zip(orders(), renyi(2.0, 1e-9), strict=True):
        if a < 12:
            assert found == pytest.approx(a / 2 * 1e-18 * math.expm1(0.25), rel=1e-6)


@pytest.mark.parametrize("order", [1.1, 2.5, 7.6, 10.9])
def test_tiny_divergences_of_little_noise_keep_their_digits_too(order: float) -> None:
    # where e^v is large and q e^v is not: third order in the rate is below a millionth
    noise, rate = 0.95, 1e-9
    found = renyi(noise, rate)[np.searchsorted(orders(), order)]
    terms = [
        math.prod(order - i for i in range(j)) / math.factorial(j) * rate**j * moment
        for j, moment in ((2, math.expm1(1 / noise**2)), (3, math.exp(3 / noise**2)))
    ]
    assert found == pytest.approx(terms[0] / (order - 1), rel=2 * abs(terms[1] / terms[0]) + 1e-12)


def test_every_unit_in_every_release() -> None:
    assert renyi(2.0, 1.0) == pytest.approx(orders() / 8)


def test_the_ends_of_the_range_are_bounds_and_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for noise in (1e-3, 0.02, 0.03, 1e4):
            for rate in (1e-12, 0.5, 1 - 1e-9):
                assert (renyi(noise, rate) >= 0).all()
    # nothing to lose by sampling: never more than without
    assert (renyi(0.5, 0.3) <= orders() / 2 / 0.25).all()


def test_epsilon_is_the_best_order_s() -> None:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = 100_000 * renyi(1.1, 0.01)
    theirs, _ = get_privacy_spent(orders=list(orders()), rdp=total, delta=1e-5)
    assert renyi_epsilon(total, 1e-5) == pytest.approx(theirs, rel=1e-12)
    assert renyi_epsilon(np.full(len(orders()), math.inf), 1e-5) == math.inf
    assert renyi_epsilon(0 * total, 0.5) == 0
