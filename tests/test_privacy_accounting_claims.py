"""The whole claim: trade-off curves, groups and replacements, held to closed forms and to sums."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

from fedtorch.privacy import LocalDP
from fedtorch.privacy.accounting import bounds, claims
from fedtorch.privacy.accounting.events import Event, epsilon
from fedtorch.privacy.accounting.gaussian import gaussian_delta, gaussian_epsilon
from fedtorch.privacy.accounting.mixed import REPLACED, worst_pair

N = NormalDist()
GRID = np.linspace(-30, 30, 60_001)


def densities(noise, rate, units):
    """The worst pair on a grid, each summing to 1."""
    pair = worst_pair(noise, rate, units)
    both = [
        sum(
            w * np.exp(-((GRID - a) ** 2) / 2 / noise**2)
            for a, w in zip(m.places, m.weights, strict=True)
        )
        for m in (pair.p, pair.q)
    ]
    return [d / d.sum() for d in both]


def hockey_stick(noise, rate, units, e):
    p, q = densities(noise, rate, units)
    return float(np.maximum(p - math.exp(e) * q, 0).sum())


@pytest.mark.parametrize("mu", [0.25, 1.0, 2.5])
def test_without_sampling_the_curve_is_gaussian(mu):
    found = claims.curve([Event("gaussian", 2 / mu, 1.0, 4)], 1e-5)
    assert found.mu == pytest.approx(mu, rel=1e-12)
    assert found.exact
    for alarms in (1e-4, 0.01, 0.3):
        power = N.cdf(N.inv_cdf(alarms) + mu)
        assert found.found(alarms) == pytest.approx(power, rel=1e-9)
        # epsilon over delta and the curve say the same: the lines of the one touch the other
        assert replace(found, mu=None).found(alarms) == pytest.approx(power, rel=0.02)
    assert found.advantage == pytest.approx(2 * N.cdf(mu / 2) - 1, rel=1e-9)
    for e, d in found.pairs[:-1]:
        assert d == pytest.approx(gaussian_delta(1 / mu, e), rel=1e-9)


def test_known_answers_of_one_release_at_noise_one():
    found = claims.curve([Event("gaussian", 1.0)], 1e-5)
    assert found.found(0.01) == pytest.approx(0.092361, abs=2e-6)
    assert found.advantage == pytest.approx(0.382925, abs=1e-6)


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.2), (0.9, 0.05)])
def test_no_test_of_one_sampled_release_beats_the_curve(noise, rate):
    found = claims.curve([Event("gaussian", noise, rate)], 1e-5)
    for absent, present in (densities(noise, rate, 1)[::-1], densities(noise, rate, 1)):
        ratio = present / absent
        order = np.argsort(-ratio)
        alarms, power = np.cumsum(absent[order]), np.cumsum(present[order])
        for at in (0.01, 0.1, 0.5):
            best = float(np.interp(at, alarms, power))
            assert best <= found.found(at) + 1e-6
    tv = abs(present - absent).sum() / 2
    assert tv <= found.advantage < tv + 0.02


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "google"),
    [  # dp-accounting 0.6, PLDAccountant(NeighboringRelation.REPLACE_ONE)
        (4, 0.01, 10000, 1e-5, 1.99319),
        (3, 0.1, 512, 1e-6, 7.82455),
        (1, 0.05, 200, 1e-4, 6.1801),
        (1, 1, 1, 1e-5, 9.99726),
        (4, 1, 100, 1e-5, 33.10373),
    ],
)
def test_google_says_the_same_of_a_replacement(noise, rate, steps, delta, google):
    parts = [(Event("gaussian", noise, rate, steps), REPLACED)]
    assert google - 1e-5 <= claims.epsilon_of(parts, delta) <= google + 0.0125
    assert claims.epsilon_of(parts, delta) <= claims.epsilon_of(parts, delta, "rdp") + 1e-9
    # neither the figure for adding and removing, nor twice that
    one = epsilon([e for e, _ in parts], delta)
    assert one < google < 3 * one


@pytest.mark.parametrize("units", [1, 2, 5, REPLACED])
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_one_release_costs_a_group_what_a_sum_over_a_grid_says(units, accountant):
    noise, rate, delta = 1.3, 0.15, 1e-4
    found = claims.epsilon_of([(Event("gaussian", noise, rate), units)], delta, accountant)
    ways = {units, -units}
    exact = max(hockey_stick(noise, rate, u, found) for u in ways)
    assert exact <= delta * (1 + 1e-6)
    if accountant == "prv":
        assert max(hockey_stick(noise, rate, u, found - 0.03) for u in ways) > delta


def test_one_unit_by_the_general_way_is_one_unit():
    run = ((1.2, 0.1, 50),)
    general = bounds._parts(((1.2, 0.1, 50, 1),), 1e-5, 5.0)[1][0][0]
    pair = worst_pair(1.2, 0.1, 1)
    losses = np.linspace(-0.09, 6, 200)
    from fedtorch.privacy.accounting import spectrum

    assert np.allclose(pair.beyond(losses), spectrum._beyond(losses, 1.2, 0.1), atol=1e-13)
    assert pair.mean(-3, 6) == pytest.approx(spectrum._mean(1.2, 0.1, -3, 6), abs=1e-12)
    assert np.allclose(pair.slope(GRID), np.gradient(pair.loss(GRID), GRID), atol=1e-3)
    assert general.size and bounds.prv(run, 1e-5) == bounds.prv(((1.2, 0.1, 50, 1),), 1e-5)


def test_no_two_vectors_are_told_apart_better_than_opposite_ones():
    """What ``mixed`` leans on, in the plane: v and w of length 1 at most, and the other at 0."""
    noise, rate, e = 0.8, 0.3, 0.7
    worst = hockey_stick(noise, rate, REPLACED, e)
    x, y = np.meshgrid(np.linspace(-5, 5, 201), np.linspace(-5, 5, 201))

    def law(cx, cy):
        far = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2 / noise**2)
        near = np.exp(-(x**2 + y**2) / 2 / noise**2)
        return ((1 - rate) * near + rate * far) / near.sum()

    rng = np.random.default_rng(0)
    told = []
    for angle, r, s in [(math.pi, 1, 1), *rng.uniform([0, 0, 0], [6.3, 1, 1], (40, 3))]:
        p, q = law(r, 0.0), law(s * math.cos(angle), s * math.sin(angle))
        told.append(float(np.maximum(p - math.exp(e) * q, 0).sum()))
    assert told[0] == pytest.approx(worst, abs=1e-4)
    assert max(told) <= worst + 1e-4


def test_groups_without_sampling_have_a_closed_form():
    run = [(Event("gaussian", 4.0, 1.0, 100), 3), (Event("gaussian", 10.0), 3)]
    mu = 3 * math.sqrt(100 / 16 + 0.01)
    assert claims.epsilon_of(run, 1e-5) == pytest.approx(gaussian_epsilon(1 / mu, 1e-5))


def test_a_person_at_two_clients_is_composed_and_no_dearer_than_at_one():
    e = Event("gaussian", 5.0, 1.0, 10)
    apart = claims.epsilon_of([(e, 2), (e, 1)], 1e-5)
    assert apart == pytest.approx(gaussian_epsilon(5 / math.sqrt(50), 1e-5))
    assert apart < claims.epsilon_of([(e, 3)], 1e-5)
    sampled = Event("gaussian", 1.5, 0.1, 40)
    spread = claims.epsilon_of([(sampled, 2), (sampled, 1)], 1e-5)
    assert claims.epsilon_of([(sampled, 2)], 1e-5) < spread
    assert spread < claims.epsilon_of([(sampled, 3)], 1e-5)


def test_other_noise_and_no_noise():
    assert claims.curve([], 1e-5).found(0.01) == pytest.approx(0.01)
    assert claims.curve([], 1e-5).advantage == 0
    bare = claims.curve([Event("gaussian", 0.0)], 1e-5)
    assert (bare.found(0.01), bare.advantage) == (1, 1)
    pure = claims.curve([Event("laplace", 2.0, 1.0, 4)], 0.0)
    assert pure.found(0.01) == pytest.approx(min(0.01 * math.exp(2), 1 - math.exp(-2) * 0.99))
    assert pure.advantage == pytest.approx(math.tanh(1))
    assert claims.epsilon_of([(Event("laplace", 2.0, 1.0, 4), 3)], 0.0) == pytest.approx(6)
    skellam = Event("skellam", 4096.0, 1.0, 5, l2=20.0, l1=60.0)
    thrice = Event("skellam", 4096.0, 1.0, 5, l2=60.0, l1=180.0)
    assert claims.epsilon_of([(skellam, 3)], 1e-5) == epsilon([thrice], 1e-5)
    found = claims.curve([skellam], 1e-5)
    assert 0.01 < found.found(0.01) < 0.6
    assert not found.exact


def test_local_noise_is_for_a_replacement_already_and_each_client_has_its_own():
    plan, event = LocalDP(epsilon=4.0, rounds=3), Event("gaussian", 3.0, 1.0, 3)
    assert plan.several([event], REPLACED) == [(event, 1)]
    assert plan.several([event], 4) == [(replace(event, steps=12), 1)]
