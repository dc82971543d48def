"""What Skellam noise costs: published vectors, and sums over whole distributions in one dimension."""

import math

import numpy as np
import pytest
from scipy import optimize, special

from fedtorch.privacy.accounting.events import Event, epsilon
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.accounting.skellam import ORDERS, skellam_renyi
from fedtorch.privacy.noise.rounding import reach
from fedtorch.types import ConfigError


def at(order, mu, l2, l1):
    return float(skellam_renyi(mu, l2, l1)[ORDERS.index(order)])


def release(clip, noise, scale, coordinates, rounds=1):
    far = reach(clip * scale, coordinates)
    l1 = min(math.sqrt(coordinates) * far, far * far)
    return Event("skellam", (noise * clip * scale) ** 2, 1.0, rounds, far, l1)


@pytest.mark.parametrize(
    ("order", "l2", "l1", "mu", "known"),
    [
        (2, 1, 1, 1, 2.5),
        (2, 1024, 2**17, 1024**2, 1.00000089407),
        (16, 1024, 2**17, 1024**2, 8.00000756979),
        (32, 100, 1e4, 400**2, 1.00000673828),
        (8, 16, 16, 256, 4.01501464844),
    ],
)
def test_divergence_of_one_release(order, l2, l1, mu, known):
    assert at(order, mu, l2, l1) == pytest.approx(known, rel=1e-10)


@pytest.mark.parametrize(
    ("clip", "noise", "scale", "coordinates", "rounds", "known"),
    [
        (1, 1, 1024, 16384, 1, 4.765090),
        (1, 4, 1024, 16384, 30, 6.856401),
        (0.3, 10, 4096, 9610, 100, 4.758822),
        (1, 2, 256, 9610, 1, 2.218162),
        (1, 8, 16384, 2**20, 50, 4.108098),
        (1, 1, 64, 16384, 1, 7.15197),  # too coarse
        (1, 1, 64, 2**20, 1, 75.30304),
    ],
)
def test_epsilon_of_a_run(clip, noise, scale, coordinates, rounds, known):
    run = [release(clip, noise, scale, coordinates, rounds)]
    assert epsilon(run, 1e-5) == pytest.approx(known, rel=5e-7)
    assert epsilon(run, 1e-5, "prv") == epsilon(run, 1e-5, "rdp")  # PRV does not know it


def log_pmf(mu, far):
    """Of -far, ..., far: ratios I_k / I_{k-1} from the far end, so that no tail vanishes."""
    ratio, logs = 0.0, np.zeros(far + 200)
    for k in range(far + 199, 0, -1):
        ratio = 1 / (2 * k / mu + ratio)
        logs[k] = math.log(ratio)
    half = np.cumsum(logs)[: far + 1]
    whole = np.concatenate([half[:0:-1], half])
    return whole - special.logsumexp(whole)


def exact(shift, noise):
    """Divergences at orders 2, 8, 32 and epsilon at 1e-5 of noise that is moved by ``shift``."""
    mu = (noise * shift) ** 2
    far = int(45 * shift * max(noise, 1 / noise)) + 40
    p = log_pmf(mu, far)
    one, other = p[shift:], p[:-shift]
    found = [special.logsumexp(a * one + (1 - a) * other) / (a - 1) for a in (2, 8, 32)]

    def delta(eps):
        return float(np.maximum(0, np.exp(one) - np.exp(eps + other)).sum())

    return found, optimize.brentq(lambda e: delta(e) - 1e-5, 0.01, 12, xtol=1e-9)


@pytest.mark.parametrize(
    ("shift", "noise", "renyi", "eps", "ratios"),
    [
        (1, 1, (0.874882, 1.559011, 2.398087), 2.40668, (2.86, 3.53, 7.30)),
        (16, 1, (0.997759, 3.816220, 11.295973), 4.33212, (1.006, 1.052, 1.42)),
        (256, 1, (0.999991, 3.999141, 15.940283), 4.37700, (1.000, 1.000, 1.004)),
        (16, 0.6, (2.732720, 8.936218, 19.793926), 7.73644, (1.03, 1.26, 2.26)),
        (16, 4, (0.062499, 0.249946, 0.996269), 0.92594, (1.000, 1.000, 1.004)),
    ],
)
def test_the_bound_is_never_below_what_one_dimension_costs(shift, noise, renyi, eps, ratios):
    mu = (noise * shift) ** 2
    found, cost = exact(shift, noise)
    bounds = [at(a, mu, shift, shift) for a in (2, 8, 32)]
    assert found == pytest.approx(renyi, abs=6e-7)
    assert cost == pytest.approx(eps, abs=2e-5)
    assert all(b >= f for b, f in zip(bounds, found, strict=True))
    assert [b / f for b, f in zip(bounds, found, strict=True)] == pytest.approx(ratios, abs=6e-3)
    assert epsilon([Event("skellam", mu, 1.0, 1, shift, shift)], 1e-5) > cost


def test_shares_of_the_noise_are_the_noise_of_all_and_fewer_cost_more():
    far = (20.0, 60.0)
    assert epsilon([Event("skellam", 900.0, 1.0, 3, *far)], 1e-5) < epsilon(
        [Event("skellam", 600.0, 1.0, 3, *far)], 1e-5
    )


def test_beside_gaussian_and_laplace_releases():
    skellam, sampled = release(1, 4, 1024, 100, 10), Event("gaussian", 2.0, 0.1, 50)
    alone, both = epsilon([skellam], 1e-5), epsilon([skellam, sampled], 1e-5)
    assert max(alone, epsilon([sampled], 1e-5)) < both < alone + epsilon([sampled], 1e-5, "rdp")
    # Gaussian noise is what Skellam noise becomes on a fine grid
    fine = release(1, 4, 2.0**30, 100, 10)
    together = epsilon([fine, Event("gaussian", 4.0, 1.0, 20)], 1e-5)
    assert together == pytest.approx(epsilon([replaced(fine, 30)], 1e-5), rel=1e-6)
    assert epsilon([skellam, Event("laplace", 2.0)], 1e-5) == alone + 0.5
    assert epsilon([skellam, Event("gaussian", 0.0)], 1e-5) == math.inf
    assert epsilon([Event("skellam", 0.0, 1.0, 1, 1.0, 1.0)], 1e-5) == math.inf


def replaced(event, steps):
    return Event.of(event.kind, steps)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rate": 0.5}, "no amplification"),
        ({"l1": None}, "l2 and l1"),
        ({"l2": 0.0}, "l2 and l1"),
        ({"l2": math.nan}, "l2 and l1"),
        ({"l1": "far"}, "l2 and l1"),
        ({"mechanism": "gaussian"}, "of skellam"),
    ],
)
def test_events_that_cannot_be_priced(options, why):
    given = {"mechanism": "skellam", "noise": 4.0, "l2": 2.0, "l1": 3.0} | options
    with pytest.raises(ConfigError, match=why):
        Event(**given)


def test_the_ledger_keeps_all_three_numbers_over_a_restart(tmp_path):
    event, path = release(0.3, 10, 4096, 9610), tmp_path / "ledger.jsonl"
    ledger = Ledger(path, "client")
    for round in range(100):
        ledger.charge(round, event, ["a", "b"] if round else ["a"])
    again = Ledger.resume(path, ledger.state_dict())
    assert [e.event for e in again.entries] == [event] * 100
    assert again.spent(1e-5) == pytest.approx(4.758822, rel=2e-7)
    by = again.spent_by_client(1e-5, "rdp")
    assert by["b"] < by["a"] == again.spent(1e-5, "rdp")
    assert Ledger.look(path).spent(1e-5) == again.spent(1e-5)
    # another sensitivity is another price, and an edited one is seen
    path.write_text(path.read_text().replace('"l1": ', '"l1": 1'))
    with pytest.raises(ConfigError, match="edited"):
        Ledger.resume(path, ledger.state_dict())


def test_a_gaussian_entry_is_written_as_ever(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).charge(0, Event("gaussian", 1.5, 0.1, 5), ["a"])
    line = path.read_text().splitlines()[1]
    assert line.startswith(
        '{"round": 0, "unit": "example", "mechanism": "gaussian", "noise": 1.5, "rate": 0.1, '
        '"steps": 5, "clients": ["a"], "digest": "'
    )
