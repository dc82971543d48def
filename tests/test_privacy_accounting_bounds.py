"""Which bound is given, and what asking for it costs."""

import math
import time
import warnings
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from fedtorch.privacy.accounting import bounds
from fedtorch.privacy.accounting.bounds import prv, rdp, unsampled


def test_a_run_that_asks_after_every_round_pays_for_few_grids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[Any] = []
    make = bounds.release
    monkeypatch.setattr(bounds, "release", lambda *a: built.append(a) or make(*a))
    bounds._release.cache_clear()
    start = time.process_time()
    # epsilon from 0.3 to 12: from below 20 on, one grid in four times the steps
    for r in range(1, 301):
        prv(((1.05, 0.05, 10 * r),), 1e-5)
    assert len(built) <= 4
    assert time.process_time() - start < 3
    built.clear()
    # below 0.2 the error follows epsilon, and above 20, but in powers of two
    for r in range(1, 101):
        prv(((5.0, 0.01, r),), 1e-5)
        prv(((0.6, 0.2, r),), 1e-5)
    assert len(built) <= 12


@pytest.mark.parametrize("steps", [1, 3, 63, 64, 65, 256, 257, 1000])
def test_all_three_bounds_hold_side_by_side(steps: int) -> None:
    run = ((1.0, 0.05, steps),)
    assert 0 < prv(run, 1e-5) <= rdp(run, 1e-5) + 0.01
    assert prv(run, 1e-5) <= unsampled(run, 1e-5)


def test_a_run_too_long_for_a_grid_gets_a_wider_error_or_none() -> None:
    assert prv(((1.0, 0.02, 2 * 10**5),), 1e-5) < rdp(((1.0, 0.02, 2 * 10**5),), 1e-5)
    assert prv(((0.5, 0.1, 10**5),), 1e-5) == math.inf
    assert rdp(((0.5, 0.1, 10**5),), 1e-5) < math.inf


def test_bounds_that_cannot_help_are_not_computed() -> None:
    assert prv(((1e4, 0.5, 10),), 1e-5) == math.inf


@pytest.mark.parametrize(
    ("run", "delta"),
    [
        (((1.374, 1.634e-4, 256),), 4.8e-8),  # RDP says 0.39, and with its error PRV said 0.020
        (((0.9, 2e-4, 1000),), 1e-6),
        (((6.0, 0.01, 200),), 1e-5),
    ],
)
def test_small_epsilons_carry_a_twentieth_and_not_a_hundredth(
    run: bounds.Run, delta: float
) -> None:
    from opacus.accountants import PRVAccountant

    theirs = PRVAccountant()
    theirs.history = list(run)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):  # advice on orders
        fine = theirs.get_epsilon(delta, eps_error=2e-4)
    assert -4e-4 <= prv(run, delta) - fine <= 0.05 * fine


@pytest.mark.parametrize("noise", [0.6, 1.0, 30.0, 1e5])
def test_the_closed_form_is_not_computed_where_it_is_the_larger_one(noise: float) -> None:
    run = ((noise, 0.3, 7),)
    for delta in (1e-3, 1e-9):
        exact = unsampled(run, delta)
        for bound in (0.0, 0.9 * exact, exact, 1.1 * exact, 1e3, math.inf):
            assert bounds.capped(run, delta, bound) == min(exact, bound)
    with patch.object(bounds, "unsampled") as called:
        assert bounds.capped(((1.0, 0.3, 7),), 1e-5, 2.0) == 2.0
    assert not called.called


def test_epsilon_does_not_fall_where_a_finer_grid_begins() -> None:
    for noise, rate, delta in ((1.374, 1.634e-4, 4.8e-8), (1.0, 0.1, 1e-5), (3.0, 0.02, 1e-7)):
        for last in (64, 256, 1024, 4096):
            at, after = (prv(((noise, rate, t),), delta) for t in (last, last + 1))
            assert after >= at * (1 - 1e-5)


def test_a_grid_is_as_large_as_it_may_be_before_its_error_is_widened() -> None:
    def grid(run: bounds.Run, delta: float) -> tuple[float, float]:
        quick = min(unsampled(run, delta), rdp(run, delta))
        error, reach, mesh, _ = bounds._grid(run, delta, quick)
        return error / bounds._error(quick), 2 * reach / mesh / bounds.PRV_POINTS

    wider, used = grid(((1.5, 0.005, 50_000),), 1e-12)
    assert wider == 1 and 0.99 < used <= 1
    wider, used = grid(((0.333, 2.83e-6, 6_509_211),), 2e-7)
    assert wider > 10 and used == pytest.approx(1)
