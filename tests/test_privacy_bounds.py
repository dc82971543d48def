"""Which bound is given, and what asking for it costs."""

import math
import time
from typing import Any

import pytest

from fedtorch.privacy import bounds
from fedtorch.privacy.bounds import prv, rdp, unsampled


def test_a_run_that_asks_after_every_round_pays_for_few_grids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[Any] = []
    make = bounds.release
    monkeypatch.setattr(bounds, "release", lambda *a: built.append(a) or make(*a))
    bounds._release.cache_clear()
    start = time.process_time()
    for r in range(
        1, 301
    ):  # epsilon from 0.3 to 12: from below 20 on, one grid in four times the steps
        prv(((1.05, 0.05, 10 * r),), 1e-5)
    assert len(built) <= 4
    assert time.process_time() - start < 3
    built.clear()
    for r in range(
        1, 101
    ):  # below 0.2 the error follows epsilon, and above 20, but in powers of two
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


def test_nothing_to_gain_is_not_computed() -> None:
    assert prv(((1e4, 0.5, 10),), 1e-5) == math.inf
