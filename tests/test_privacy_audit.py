"""Audits: published figures, no false alarm on correct mechanisms, an alarm on broken ones."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedtorch.privacy.accounting.gaussian import gaussian_epsilon
from fedtorch.privacy.audit import (
    clopper_pearson_epsilon,
    one_run_epsilon,
    one_run_gaussian_epsilon,
    one_run_p_value,
)
from fedtorch.types import ConfigError


@pytest.mark.parametrize(
    ("counts", "bound"),
    [
        ((1000, 1000, 0, 1000), 5.600577),
        ((900, 1000, 10, 1000), 3.871959),
        ((100, 100, 0, 100), 3.281336),
        ((500, 1000, 500, 1000), 0),
        ((0, 10, 0, 10), 0),
        ((10, 10, 10, 10), 0),
    ],
)
def test_clopper_pearson(counts: tuple[int, int, int, int], bound: float) -> None:
    assert clopper_pearson_epsilon(*counts, delta=1e-5) == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "bound"),
    [
        (1000, 1000, 600, 0, 0.297468),
        (1000, 1000, 700, 1e-5, 0.731741),
        (1000, 100, 99, 1e-5, 3.002832),
        (1000, 100, 100, 1e-5, 3.465376),
        (100, 100, 80, 1e-5, 0.958086),
        (10000, 1000, 950, 1e-5, 2.690996),
        (5000, 100, 100, 1e-5, 3.352420),
        (1000, 50, 50, 0, 2.784727),
        (1000, 1000, 500, 1e-5, 0),
    ],
)
def test_one_run(canaries: int, guesses: int, correct: int, delta: float, bound: float) -> None:
    assert one_run_epsilon(canaries, guesses, correct, delta) == pytest.approx(bound, abs=2e-6)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "bound"),
    [
        (1000, 1000, 600, 0.58354),
        (1000, 1000, 700, 1.371980),
        (1000, 100, 99, 4.726715),
        (1000, 100, 100, 5.549028),
        (100, 100, 80, 2.130336),
        (10000, 1000, 950, 3.802444),
    ],
)
def test_one_run_against_a_gaussian(
    canaries: int, guesses: int, correct: int, bound: float
) -> None:
    assert one_run_gaussian_epsilon(canaries, guesses, correct) == pytest.approx(bound, abs=6e-6)


def normal(mean: float, n: int) -> np.ndarray:
    """n points at the quantiles of N(mean, 1)."""
    return stats.norm.ppf((np.arange(n) + 0.5) / n) + mean


def hull(within: np.ndarray, without: np.ndarray) -> list[tuple[int, int]]:
    """Counts below each threshold (in, out) that a straight line between two others does not reach."""
    thresholds = np.append(np.union1d(within, without), np.inf)
    fn = np.searchsorted(np.sort(within), thresholds)
    tn = np.searchsorted(np.sort(without), thresholds)
    kept: list[tuple[int, int]] = []
    for point in zip(fn.tolist(), tn.tolist(), strict=True):
        while len(kept) > 1:
            (ax, ay), (bx, by) = kept[-2:]
            if (by - ay) * (point[0] - bx) > (point[1] - by) * (bx - ax):
                break
            kept.pop()
        kept.append(point)
    return kept


@pytest.mark.parametrize(
    ("shift", "bound", "against_gaussian"),
    [(1, 1.13346, 2.164749), (2, 2.311945, 4.7218075), (4, 4.395568, 9.133752)],
)
def test_jax_privacy_on_normal_scores(shift: float, bound: float, against_gaussian: float) -> None:
    n = 10_000
    points = hull(normal(shift, n), normal(0, n))
    p = 0.05 / len(points)

    def best(audit: Callable[[int, int, int, float, float], float]) -> float:
        # one smooth peak over thresholds: every 200th, then all around the best
        def at(i: int) -> float:
            fn, tn = points[i]
            guesses, correct = 2 * n - fn - tn, n - fn
            return audit(2 * n, guesses, correct, 1e-6, p) if 2 * correct > guesses else 0.0

        step, centre, reach = 200, len(points) // 2, len(points) // 2
        while True:
            around = range(max(0, centre - reach), min(len(points), centre + reach + 1), step)
            centre = max(around, key=at)
            if step == 1:
                return at(centre)
            reach, step = 2 * step, max(1, step // 8)

    assert best(one_run_epsilon) == pytest.approx(bound, rel=1e-5)
    assert best(one_run_gaussian_epsilon) == pytest.approx(against_gaussian, rel=1e-5)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60), st.floats(0, 3))
def test_p_value_by_the_definition(
    canaries: int, guesses: int, correct: int, epsilon: float
) -> None:
    guesses = min(guesses, canaries)
    correct = min(correct, guesses)
    q, delta = math.exp(epsilon) / (1 + math.exp(epsilon)), 1e-3
    chance = [float(stats.binom.pmf(k, guesses, q)) for k in range(guesses + 1)]
    beta = sum(chance[correct:])
    alpha = max([sum(chance[correct - i : correct]) / i for i in range(1, correct + 1)], default=0)
    expected = min(1, beta + 2 * canaries * delta * alpha)
    assert one_run_p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_more_right_guesses_never_prove_less(guesses: int, share: float, more: float) -> None:
    few = int(share * guesses)
    many = few + int(more * (guesses - few))
    for audit in (one_run_epsilon, one_run_gaussian_epsilon):
        assert audit(1000, guesses, few) <= audit(1000, guesses, many) + 1e-6


def one_step(noise: float, runs: int, seed: int) -> tuple[int, int, int, int]:
    """Attack one Gaussian release of a 0 or a 1: the threshold is fixed beforehand."""
    draw = np.random.default_rng(seed)
    threshold = 0.5 + noise
    within = 1 + noise * draw.standard_normal(runs)
    without = noise * draw.standard_normal(runs)
    return int((within > threshold).sum()), runs, int((without > threshold).sum()), runs


@pytest.mark.parametrize("noise", [0.6, 1.0, 2.0])
def test_an_audit_passes_right_noise_and_fails_half_of_it(noise: float) -> None:
    claim = gaussian_epsilon(noise, 0.05)
    assert clopper_pearson_epsilon(*one_step(noise, 100_000, 1), delta=0.05, p=0.001) <= claim
    assert clopper_pearson_epsilon(*one_step(noise / 2, 100_000, 1), delta=0.05, p=0.001) > claim


@pytest.mark.parametrize("noise", [0.5, 1, 2])
def test_power_with_a_thousand_canaries(noise: float) -> None:
    # each canary is a coordinate of its own; only the surest quarter is guessed
    draw = np.random.default_rng(5)
    coins = draw.integers(0, 2, 1000)
    scores = coins + noise * draw.standard_normal(1000) - 0.5
    surest = np.argsort(-np.abs(scores))[:250]
    correct = int(((scores > 0) == (coins == 1))[surest].sum())
    found = one_run_epsilon(1000, 250, correct)
    tighter = one_run_gaussian_epsilon(1000, 250, correct)
    truth = gaussian_epsilon(noise, 1e-5)
    assert 0.2 * truth < found < tighter < truth
    assert tighter > 0.35 * truth


def test_uniform_noise_is_private_at_no_epsilon() -> None:
    # noise uniform in +-1/epsilon, claimed epsilon 1: some coordinate lands where the neighbour's never can
    coordinates, shift, runs = 1000, 0.01, 2000
    draw = np.random.default_rng(0)
    caught = sum(bool((draw.uniform(-1, 1, coordinates) + shift > 1).any()) for _ in range(runs))
    assert caught / runs == pytest.approx(1 - (1 - shift / 2) ** coordinates, abs=0.01)
    assert 1 - (1 - shift / 2) ** coordinates == pytest.approx(0.993, abs=5e-4)
    assert clopper_pearson_epsilon(caught, runs, 0, runs) > 6
    # and so on, without end
    assert clopper_pearson_epsilon(10 * caught, 10 * runs, 0, 10 * runs) > 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: clopper_pearson_epsilon(11, 10, 0, 10),
            "true_positives must be between 0 and positives",
        ),
        (lambda: clopper_pearson_epsilon(1, 10, -1, 10), "false_positives must be"),
        (lambda: clopper_pearson_epsilon(0, 0, 0, 10), "got 0 of 0"),
        (
            lambda: one_run_epsilon(10, 11, 5),
            "guesses must be between 0 and canaries, got 11 of 10",
        ),
        (lambda: one_run_epsilon(10, 5, 6), "correct must be between 0 and guesses, got 6 of 5"),
        (lambda: one_run_epsilon(10, 5, 5, delta=1), r"delta must be in \[0, 1\)"),
        (lambda: one_run_epsilon(10, 5, 5, p=0), r"p must be in \(0, 1\), got 0"),
        (
            lambda: one_run_gaussian_epsilon(10, 5, 5, delta=0),
            "no Gaussian release is private at delta 0",
        ),
    ],
)
def test_refused(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_no_guess_proves_nothing() -> None:
    assert one_run_epsilon(100, 0, 0) == 0
    assert one_run_gaussian_epsilon(100, 0, 0) == 0
    assert all(
        a <= b for a, b in itertools.pairwise([one_run_epsilon(100, k, k) for k in range(20)])
    )
