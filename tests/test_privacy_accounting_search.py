"""What a random search costs: the paper's formula, known answers, and exact searches summed out."""

import math

import numpy as np
import pytest

from fedtorch.privacy import DistributedDP, LocalDP, SampleLevel
from fedtorch.privacy.accounting.events import Event, epsilon
from fedtorch.privacy.accounting.renyi import orders, renyi, renyi_epsilon
from fedtorch.privacy.accounting.search import (
    PoissonTrials,
    Trials,
    search_epsilon,
    search_noise,
)
from fedtorch.types import ConfigError

RUNS = {
    "one": Event("gaussian", 4.0),
    "full": Event("gaussian", 10.0, 1.0, 100),
    "rare": Event("gaussian", 1.1, 0.01, 1000),
    "default": Event("gaussian", 1.682, 0.2, 150),
}
# dp-accounting 0.6 (RdpAccountant of a RepeatAndSelectDpEvent) is equal at whole orders
KNOWN = [  # logarithmic, geometric, Poisson
    ("one", 4, 1.6019, 1.8628, 1.5801),
    ("one", 100, 2.1299, 2.7162, 8.3872),
    ("full", 10, 7.4104, 8.5145, 10.2108),
    ("rare", 10, 2.9189, 3.4328, 3.6390),
    ("rare", 30, 3.2387, 3.9212, 6.9211),
    ("default", 10, 12.6160, 13.8829, 16.7950),
]


@pytest.mark.parametrize(("run", "mean", "logarithmic", "geometric", "poisson"), KNOWN)
def test_known_answers(run, mean, logarithmic, geometric, poisson):
    for trials, known in (
        (Trials(mean, 0.0), logarithmic),
        (Trials(mean), geometric),
        (PoissonTrials(mean), poisson),
    ):
        assert search_epsilon([RUNS[run]], trials, 1e-5) == pytest.approx(known, abs=6e-5)


@pytest.mark.parametrize(
    ("eta", "known"),
    [
        (0.0, [0.096650, 0.026918, 0.006594, 0.001542]),
        (0.5, [0.177692, 0.062500, 0.018962, 0.005366]),
        (1.0, [0.25, 0.1, 1 / 30, 0.01]),
    ],
)
def test_the_chance_that_belongs_to_a_mean(eta, known):
    found = [Trials(mean, eta).gamma for mean in (4, 10, 30, 100)]
    assert found == pytest.approx(known, abs=6e-7)


def test_the_formula_order_by_order():
    one, a, mean = renyi(1.1, 0.01) * 1000, orders(), 10
    h = np.concatenate([[1.0], a])
    beside = np.concatenate([[0.0], one])
    least = min((1 - 1 / h) * beside + math.log(mean) / h)
    known = one + 2 * least + math.log(mean) / (a - 1)
    assert np.allclose(Trials(mean).divergence(one), known)
    found = search_epsilon([RUNS["rare"]], Trials(mean), 1e-5)
    assert found == pytest.approx(renyi_epsilon(known, 1e-5))


def test_no_search_is_cheaper_than_it_is():
    """Exact: a run gives one of three results, and the best of a geometric number of them is released."""
    p, q = np.array([0.9, 0.09, 0.01]), np.array([0.9, 0.099, 0.001])
    for order in (2.0, 5.0):
        one = math.log(float((p**order * q ** (1 - order)).sum())) / (order - 1)

        def best(law, gamma=0.25):
            # P(best <= i) is the generating function of the number of runs at P(one run <= i)
            up_to = np.cumsum(law)
            return np.diff(gamma * up_to / (1 - (1 - gamma) * up_to), prepend=0)

        r, s = best(p), best(q)
        exact = math.log(float((r**order * s ** (1 - order)).sum())) / (order - 1)
        worst = math.log(float((p / q).max()))  # of any order
        bound = one + 2 * min(worst, math.log(4)) + math.log(4) / (order - 1)
        assert one < exact <= bound


@pytest.mark.parametrize(
    ("mean", "logarithmic", "geometric"), [(4, 2.2607, 2.4369), (10, 2.4697, 2.7907)]
)
def test_noise_of_a_search_that_costs_8_in_all(mean, logarithmic, geometric):
    for trials, known in ((Trials(mean, 0.0), logarithmic), (Trials(mean), geometric)):
        found = search_noise(8.0, 1e-5, 0.2, 150, trials)
        assert found == pytest.approx(known, abs=6e-5)
        run = Event("gaussian", found, 0.2, 150)
        assert 8 - 1e-4 < search_epsilon([run], trials, 1e-5) <= 8


def test_a_plan_of_a_search_is_priced_as_the_whole():
    alone = SampleLevel(epsilon=8.0, rounds=30)
    plan = SampleLevel(epsilon=8.0, rounds=30, search=10)
    noise = plan.calibrated(30)
    assert noise == pytest.approx(2.7907, abs=6e-5)
    assert noise > alone.calibrated(30)
    assert plan.planned(noise, 30) == pytest.approx(8, abs=1e-4)
    assert epsilon([Event("gaussian", noise, 0.2, 150)], 1e-5) == pytest.approx(4.07, abs=0.02)


def test_what_is_no_search_is_refused():
    for plan in (LocalDP, DistributedDP):
        with pytest.raises(ConfigError, match="who is not trusted sees every run"):
            plan(search=10)
    with pytest.raises(ConfigError, match="more than 1 run"):
        SampleLevel(search=1)
    with pytest.raises(ConfigError, match="cannot be reached by a search of 10 runs"):
        search_noise(1e-3, 1e-5, 1.0, 1, Trials(10))
    with pytest.raises(ConfigError, match="Renyi divergence of Gaussian"):
        search_epsilon([Event("laplace", 1.0)], Trials(10), 1e-5)
    assert math.isinf(search_epsilon([Event("gaussian", 0.0)], Trials(10), 1e-5))
    assert search_epsilon([], Trials(10), 1e-5) == 0
