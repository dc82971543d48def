"""Closed forms against published figures and against numerical integration."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from fedtorch.privacy.accounting.gaussian import (
    above,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_noise,
    laplace_epsilon,
    quantile,
    sampled_delta,
    scaled_tail,
    tail,
)

DIGIT = 2.0**-52


@pytest.mark.parametrize(
    ("epsilon", "delta", "noise"),
    [
        (0.1, 1e-5, 30.749566),
        (0.5, 1e-5, 7.031827),
        (1, 1e-5, 3.730632),
        (1, 1e-6, 4.224679),
        (2, 1e-6, 2.230476),
        (4, 1e-5, 1.081162),
        (8, 1e-5, 0.600229),
        (10, 1e-3, 0.406060),
    ],
)
def test_analytic_gaussian(epsilon: float, delta: float, noise: float) -> None:
    assert gaussian_noise(epsilon, delta) == pytest.approx(noise, abs=1e-6)
    assert gaussian_epsilon(noise, delta) == pytest.approx(epsilon, rel=1e-5)
    assert gaussian_delta(noise, epsilon) == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize(
    ("noise", "steps", "epsilon"),
    [
        (10, 100, 4.377178),
        (10, 50, 2.943225),
        (20, 100, 1.993091),
        (5, 20, 3.848610),
        (4, 100, 13.206712),
    ],
)
def test_releases_without_sampling(noise: float, steps: int, epsilon: float) -> None:
    assert gaussian_epsilon(noise / math.sqrt(steps), 1e-5) == pytest.approx(epsilon, abs=1e-6)


def test_the_textbook_noise_is_wrong_at_large_epsilon_and_wasteful_at_small() -> None:
    def textbook(epsilon: float, delta: float) -> float:
        return math.sqrt(2 * math.log(1.25 / delta)) / epsilon

    assert textbook(1, 1e-5) == pytest.approx(4.845, abs=1e-3)
    assert textbook(1, 1e-5) > gaussian_noise(1, 1e-5)
    assert textbook(10, 1e-3) == pytest.approx(0.3776, abs=1e-4)
    assert textbook(10, 1e-3) < gaussian_noise(10, 1e-3)
    assert gaussian_epsilon(textbook(10, 1e-3), 1e-3) == pytest.approx(11.03, abs=0.01)
    assert gaussian_delta(textbook(10, 1e-5), 10) == pytest.approx(2.3e-5, rel=0.02)
    assert gaussian_delta(textbook(8, 0.1), 8) == pytest.approx(0.236, abs=1e-3)


def test_more_published_figures() -> None:
    assert gaussian_delta(math.sqrt(3) / math.sqrt(3), 1) == pytest.approx(0.126936, abs=1e-6)
    # rho = 0.81 zCDP of a production language model: exact for the Gaussian that has it, 8.92 by conversion
    assert gaussian_epsilon(1 / math.sqrt(2 * 0.81), 1e-10) == pytest.approx(8.5489, abs=1e-4)
    # replacing a unit is twice the sensitivity of removing one
    assert gaussian_epsilon(1 / 2, 1e-5) == pytest.approx(9.99726, abs=1e-5)
    assert gaussian_epsilon(4 / math.sqrt(100) / 2, 1e-5) == pytest.approx(33.10373, abs=1e-4)


def test_local_noise_is_twenty_times_the_central_one() -> None:
    # 100 clients, clip 1, 26010 weights, (8, 1e-5) once: what is left on the mean of their updates
    noise = gaussian_noise(8, 1e-5)
    assert 2 * noise * math.sqrt(26010 / 100) == pytest.approx(19.4, abs=0.05)
    assert noise * math.sqrt(26010) / 100 == pytest.approx(0.97, abs=0.005)


def test_a_weight_of_nine_tenths_is_nine_times_the_uniform_sensitivity() -> None:
    # noise for 1/n each, one of ten clients weighted 0.9: 78, not 4.4
    assert gaussian_epsilon(1 / (0.9 * 10), 1e-5) == pytest.approx(78.07, abs=0.01)


@pytest.mark.parametrize(
    ("rate", "noise", "epsilon", "delta"),
    [
        (0.1, 1, 0.5, 0.00203253692034),
        (0.01, 0.7, 0.3, 0.000135473665799),
        (0.2, 0.5, 1, 0.0578404059975),
    ],
)
def test_one_sampled_step(rate: float, noise: float, epsilon: float, delta: float) -> None:
    assert sampled_delta(noise, epsilon, rate) == pytest.approx(delta, rel=1e-11)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.5])
def test_one_sampled_step_by_integration(rate: float, noise: float, epsilon: float) -> None:
    def gap(x: float) -> float:
        without, within = stats.norm.pdf(x, 0, noise), stats.norm.pdf(x, 1, noise)
        return max(0.0, (1 - rate) * without + rate * within - math.exp(epsilon) * without)

    crossing = noise**2 * math.log((math.exp(epsilon) - 1 + rate) / rate) + 0.5
    top = crossing + 12 * noise + 1
    value, _ = integrate.quad(gap, crossing, top, epsabs=1e-13, epsrel=1e-10, limit=200)
    assert sampled_delta(noise, epsilon, rate) == pytest.approx(value, rel=1e-7, abs=1e-12)


@settings(deadline=None)
@given(st.floats(0.05, 50), st.floats(0, 20))
def test_sampling_at_rate_one_is_the_plain_release(noise: float, epsilon: float) -> None:
    assert sampled_delta(noise, epsilon, 1.0) == pytest.approx(
        gaussian_delta(noise, epsilon), abs=1e-14
    )


@settings(deadline=None)
@given(st.floats(1e-3, 300), st.floats(1e-12, 0.5))
def test_noise_and_epsilon_are_inverses(epsilon: float, delta: float) -> None:
    noise = gaussian_noise(epsilon, delta)
    assert gaussian_epsilon(noise, delta) == pytest.approx(epsilon, rel=1e-6, abs=1e-6)
    assert gaussian_delta(noise, epsilon) <= delta * (1 + 1e-9)


@settings(deadline=None)
@given(st.floats(1e-3, 1e6), st.floats(1e-12, 0.5), st.floats(1.001, 10))
def test_more_noise_never_costs_more(noise: float, delta: float, factor: float) -> None:
    assert gaussian_epsilon(noise * factor, delta) <= gaussian_epsilon(noise, delta)


@given(st.floats(0, 30) | st.floats(24.9, 25.1) | st.floats(1e-300, 1e8))
@example(25.0)
@example(math.nextafter(25, 26))
def test_the_scaled_tail_is_right_to_two_units_of_the_last_digit(x: float) -> None:
    with mpmath.workdps(40):
        m = mpmath.mpf(x)
        root = m * mpmath.sqrt(mpmath.pi)
        truth = mpmath.exp(m * m) * mpmath.erfc(m) if x < 1e4 else (1 - 1 / (2 * m * m)) / root
        assert abs(scaled_tail(x) / truth - 1) < 2 * DIGIT


def test_tails_are_right_as_far_as_there_are_numbers() -> None:
    at = np.concatenate([np.linspace(-38, 37, 301), [math.inf, -math.inf]])
    found, one = above(at), [tail(x) for x in at]
    with mpmath.workdps(40):
        truth = np.array([float(mpmath.erfc(x / mpmath.sqrt(2)) / 2) for x in at])
    # half a unit in what is squared becomes x^2 units of the result
    allowed = DIGIT * (2 + at[:-2] ** 2) * truth[:-2]
    assert (abs(found - truth)[:-2] <= allowed).all() and (abs(one - truth)[:-2] <= allowed).all()
    assert [*found[-2:], *one[-2:]] == [0, 1, 0, 1]
    assert above(at[5:0:-2]).tolist() == found[5:0:-2].tolist()
    assert above(np.float64(1.0)) == pytest.approx(stats.norm.sf(1.0), rel=4 * DIGIT)
    for p in (1e-300, 1e-10, 0.3, 0.5, 1 - 1e-5):
        assert quantile(p) == pytest.approx(stats.norm.ppf(p), rel=8 * DIGIT)


def test_edges() -> None:
    assert gaussian_epsilon(0, 1e-5) == math.inf
    assert gaussian_delta(0, 5) == 1
    assert gaussian_epsilon(1e9, 1e-5) == 0
    assert gaussian_epsilon(1e-300, 1e-5) == math.inf
    assert 0 < gaussian_noise(1e-9, 1e-12) < math.inf
    assert gaussian_delta(1, 1000) == 0  # below the smallest double, not negative
    assert sampled_delta(0, 1, 0.3) == 0.3


def test_laplace() -> None:
    assert laplace_epsilon(2.0) == 0.5
    assert laplace_epsilon(0) == math.inf
    assert laplace_epsilon(1, rate=0.1) == pytest.approx(math.log(1 + 0.1 * (math.e - 1)))
    assert laplace_epsilon(1e-5, rate=0.5) == pytest.approx(1e5 + math.log(0.5))


@settings(deadline=None)
@given(st.floats(0.05, 10), st.floats(0.01, 1))
def test_sampled_laplace_is_the_largest_ratio(noise: float, rate: float) -> None:
    def density(x: float, at: float) -> float:
        return math.exp(-abs(x - at) / noise) / (2 * noise)

    ratios = []
    for x in (-30.0, 0.0, 0.5, 1.0, 30.0):
        mixed = (1 - rate) * density(x, 0) + rate * density(x, 1)
        if mixed > 1e-250 and density(x, 0) > 1e-250:
            ratios.append(abs(math.log(mixed / density(x, 0))))
    assert max(ratios) == pytest.approx(laplace_epsilon(noise, rate), rel=1e-9)
