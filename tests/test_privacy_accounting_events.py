"""Whole runs against published figures, an independent accountant, and the rules of composition."""

import math
import warnings
from typing import Any

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtorch.privacy.accounting import bounds, spectrum
from fedtorch.privacy.accounting.events import Event, calibrate, epsilon, merge
from fedtorch.privacy.accounting.renyi import orders, renyi
from fedtorch.types import ConfigError


def gaussian(noise: float, rate: float = 1.0, steps: int = 1) -> Event:
    return Event("gaussian", noise, rate, steps)


TABLE = [  # noise, rate, steps, delta, RDP here, RDP of dp-accounting, PRV, PLD
    (1.1, 256 / 60000, 14062, 1e-5, 2.596556, 2.596556, 2.39174, 2.38169),
    (1.5, 0.04, 2250, 1e-5, 7.329111, 7.329335, 6.77913, 6.76879),
    (3, 0.1, 512, 1e-6, 4.050970, 4.050970, 3.77986, 3.76969),
    (1.3, 0.0025, 6000, 1e-5, 0.724223, 0.724223, 0.65006, 0.64011),
    (1, 1e-3, 30000, 1e-7, 1.415499, 1.415499, 1.10773, 1.09820),
    (4, 0.01, 10000, 1e-5, 1.035490, 1.035490, 0.95694, 0.94700),
    (1, 0.1, 100, 1e-5, 7.899255, 7.903850, 7.05706, 7.04660),
    (1, 0.01, 1000, 1e-5, 2.101365, 2.101367, 1.838372, 1.828244),
    (2, 0.05, 400, 1e-5, 2.460997, 2.460997, 2.256588, 2.246447),
    (0.8, 0.05, 200, 1e-4, 7.490260, 7.510011, 6.483139, 6.472586),
    (1.2, 0.1, 500, 1e-3, 10.017494, 10.103365, 8.892017, 8.881254),
    (5, 0.2, 100, 1e-6, 1.991692, 1.991692, 1.855107, 1.845010),
    (1.5, 0.25, 40, 1e-3, 4.758998, 4.767649, 4.112675, 4.102223),
    (0.6, 0.02, 300, 1e-4, 8.269219, 8.286341, 6.886670, 6.875998),
    (1, 0.05, 200, 1e-4, 4.5936, 4.5950, 4.0096, 3.9993),  # client level: 50 of 1000
    (2, 0.05, 200, 1e-4, 1.4687, 1.4687, 1.3140, 1.3038),
    (4, 0.05, 200, 1e-4, 0.6178, 0.6178, 0.5573, 0.5471),
    (1, 0.1, 100, 1e-3, 5.6405, 5.6551, 4.7949, 4.7844),
]

EXACT = [  # noise, rate, steps, delta, exact epsilon (PLD)
    (1.23, 512 / 60000, 4687, 1e-5, 2.363),  # Tramer and Boneh: MNIST, Fashion-MNIST, CIFAR-10
    (2.15, 2048 / 60000, 1171, 1e-5, 2.388),
    (1.54, 1024 / 50000, 1464, 1e-5, 2.386),
    (3, 0.1, 155, 1e-6, 2.0),  # jax_privacy: the steps that fit into epsilon 2
    (0.5, 0.2, 3, 0.15594, 1.0),  # dp-accounting
    (0.7, 0.01, 120, 1e-5, 2.46),  # where GDP says 1.06
    (1.4737, 0.05, 100, 1e-6, 2.0),  # client sampling and, next, groups of clients taking turns
    (1.9382, 0.1, 50, 1e-6, 2.0),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "exact"), EXACT)
def test_exact_figures(noise: float, rate: float, steps: int, delta: float, exact: float) -> None:
    found = epsilon([gaussian(noise, rate, steps)], delta)
    assert found - 0.01 == pytest.approx(exact, abs=0.005)  # published to two or three places


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "by_rdp", "loose", "by_prv", "exact"), TABLE
)
def test_sampled_gaussian(
    noise: float,
    rate: float,
    steps: int,
    delta: float,
    by_rdp: float,
    loose: float,
    by_prv: float,
    exact: float,
) -> None:
    run = [gaussian(noise, rate, steps)]
    prv = epsilon(run, delta)
    assert epsilon(run, delta, "rdp") == pytest.approx(by_rdp, abs=6e-5)
    # dp-accounting drops the signs of fractional binomials, so it may lie above
    assert by_rdp <= loose <= by_rdp * 1.06
    assert prv == pytest.approx(by_prv, abs=3e-4)
    assert exact <= prv + 5e-5 <= exact + 0.0111


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "value"),
    [  # Microsoft's prv_accountant, as Opacus quotes it
        (0.8, 0.001, 100, 1e-6, 0.270403),
        (1.5, 0.05, 100, 1e-6, 1.953853),
        (3, 0.2, 100, 1e-6, 3.381221),
        (0.8, 0.001, 1000, 1e-6, 0.477771),
        (1.5, 0.05, 1000, 1e-6, 6.209969),
        (2, 0.05, 1000, 1e-6, 4.172800),
        (3, 0.05, 20000, 1e-6, 13.961115),
        (3, 0.001, 50000, 1e-6, 0.309694),
        (1.5, 0.04, 2249, 1e-5, 6.777395712150674),
    ],
)
def test_published_prv(noise: float, rate: float, steps: int, delta: float, value: float) -> None:
    assert epsilon([gaussian(noise, rate, steps)], delta) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "value"),
    [
        (1.5, 0.04, 2250, 1e-5, 7.32911117143),  # Opacus
        (1.3, 150 / 60000, 6000, 1e-5, 0.7242234026109595),  # TF-Privacy
        (1.0, 100 / 100000, 30000, 1e-7, 1.4154988495444842),
        (1.1, 256 / 60000, 14062, 1e-5, 2.5966),  # TF-Privacy tutorials, tight conversion
        (1.3, 256 / 60000, 3515, 1e-5, 0.9544),
        (0.7, 256 / 60000, 10546, 1e-5, 6.3181),
        (1.1, 240 / 60000, 15000, 1e-5, 2.5029),  # Opacus's MNIST example, today's conversion
        (1.3, 240 / 60000, 3750, 1e-5, 0.9220),
        (0.7, 240 / 60000, 11250, 1e-5, 6.0925),
        (1.0, 5000 / 763430, 5000, 1e-9, 4.1833),  # McMahan 2018: 4.634 then; 4.2115 by orders < 64
        (10, 4096 / 50000, 875, 1e-5, 0.9877),  # De et al. 2022, CIFAR-10 at epsilon 1
    ],
)
def test_published_rdp(noise: float, rate: float, steps: int, delta: float, value: float) -> None:
    tolerance = 1e-9 if value > 5 and noise == 1.5 else 2e-4
    assert epsilon([gaussian(noise, rate, steps)], delta, "rdp") == pytest.approx(
        value, abs=tolerance
    )


@pytest.mark.parametrize(
    ("steps", "value"),
    [
        (1, 0.697),
        (10, 0.700),
        (100, 0.725),
        (1000, 0.774),
        (10**4, 0.884),
        (10**5, 1.899),
        (10**6, 6.829),
    ],
)
def test_mcmahan_table_one(steps: int, value: float) -> None:
    found = epsilon([gaussian(1, 1e2 / 1e5, steps)], 1e5**-1.1, "rdp")
    assert found == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize(
    ("noise", "epochs", "size", "by_prv"),
    [
        (1.1, 60, 256, 2.3917),
        (1.3, 15, 256, 0.8745),
        (0.7, 45, 256, 5.6498),
        (1.3, 15, 240, 0.8436),
    ],
)
def test_a_tutorials_figure_is_matched(noise: float, epochs: int, size: int, by_prv: float) -> None:
    steps = epochs * 60000 // size
    assert epsilon([gaussian(noise, size / 60000, steps)], 1e-5) == pytest.approx(by_prv, abs=5e-4)


def test_renyi_orders() -> None:
    found = dict(zip(orders(), renyi(1.1, 0.01), strict=True))
    for order, value in {
        2: 1.285100816e-4,
        3: 1.962778899e-4,
        4: 2.667183146e-4,
        5: 3.401579663e-4,
        8: 5.840703355e-4,
        16: 1.699826728,
        32: 8.469416434,
        63: 21.35361073,
    }.items():
        assert found[order] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("noise", "steps", "value"),
    [
        (10, 100, 4.377178),
        (10, 50, 2.943225),
        (20, 100, 1.993091),
        (5, 20, 3.848610),
        (4, 100, 13.206712),
    ],
)
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_closed_form_without_sampling(
    noise: float, steps: int, value: float, accountant: str
) -> None:
    assert epsilon([gaussian(noise, 1, steps)], 1e-5, accountant) == pytest.approx(value, abs=1e-6)


def test_closed_form_over_different_noises() -> None:
    mixed = [gaussian(3, 1, 4), gaussian(5, 1, 10), gaussian(3, 1, 1)]
    same = [gaussian(1 / math.sqrt(5 / 9 + 10 / 25))]
    assert epsilon(mixed, 1e-5) == pytest.approx(epsilon(same, 1e-5), rel=1e-12)


def test_different_events_together() -> None:
    run = [gaussian(1, 0.01, 100), gaussian(2, 0.02, 50)]
    assert epsilon(run, 1e-5, "rdp") == pytest.approx(1.240231, abs=1e-6)
    assert epsilon(run, 1e-5) == pytest.approx(0.766966, abs=1e-5)
    assert 0 <= epsilon(run, 1e-5) - 0.756872 <= 0.011


def test_published_calibration() -> None:
    # Opacus stops its own search anywhere within 0.01 of epsilon, hence the width
    for accountant, steps, noise in [("rdp", 2250, 1.416), ("prv", 2250, 1.34765625)]:
        assert calibrate(8, 1e-5, 0.04, steps, accountant) == pytest.approx(noise, abs=2e-3)
    assert calibrate(8, 1e-5, 0.04, 2000, "rdp") == pytest.approx(1.3562, abs=2e-3)
    assert calibrate(8, 1e-5, 0.04, 2000, "prv") == pytest.approx(1.2915, abs=2e-3)


def test_calibration_is_for_the_whole_run() -> None:
    whole = calibrate(8, 1e-5, 0.1, 1000, "prv")
    assert whole == pytest.approx(2.053223, abs=1e-3)
    assert whole > 2.050733  # the exact one
    assert calibrate(8, 1e-5, 0.1, 1000, "rdp") == pytest.approx(2.172852, abs=1e-3)
    # noise for the 20 steps of one round, used for 50 rounds: not 8 but more than 50
    assert epsilon([gaussian(calibrate(8, 1e-5, 0.1, 20, "rdp"), 0.1, 1000)], 1e-5, "rdp") > 50
    assert epsilon([gaussian(calibrate(8, 1e-5, 0.1, 20), 0.1, 1000)], 1e-5) > 50


@pytest.mark.parametrize(
    ("target", "sampled", "unsampled"),
    [(1, 2.4470, 45.05), (2, 1.4853, 24.53), (4, 0.9999, 13.56), (8, 0.7312, 7.68)],
)
def test_client_level_calibration(target: float, sampled: float, unsampled: float) -> None:
    found = calibrate(target, 1e-4, 0.05, 200)
    assert sampled - 1e-4 <= found <= sampled * 1.015  # PRV is up to 0.01 of epsilon above exact
    assert calibrate(target, 1e-4, 1.0, 200) == pytest.approx(unsampled, abs=0.01)


@pytest.mark.parametrize(("target", "noise"), [(3.77, 3.0), (1, 9.66)])
def test_jax_privacy_calibration(target: float, noise: float) -> None:
    assert calibrate(target, 1e-6, 0.1, 512) == pytest.approx(noise, rel=0.012)


@settings(max_examples=3, deadline=None)
@given(st.floats(0.02, 20), st.floats(1e-8, 1e-2), st.floats(1e-3, 1), st.integers(1, 500))
def test_calibration_ends_just_below_its_target(
    target: float, delta: float, rate: float, steps: int
) -> None:
    try:
        noise = calibrate(target, delta, rate, steps, "rdp")
    except ConfigError as e:
        assert "smallest" in str(e)
        return
    spent = epsilon([gaussian(noise, rate, steps)], delta, "rdp")
    assert max(0, target - 0.02) < spent <= target


@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(0.05, 0.1, 1000), (1, 1e-4, 1), (20, 0.1, 100), (1e-3, 0.5, 100)]
)
def test_prv_calibration_ends_just_below_its_target(target: float, rate: float, steps: int) -> None:
    spent = epsilon([gaussian(calibrate(target, 1e-5, rate, steps), rate, steps)], 1e-5)
    assert max(0, target - 0.02) < spent <= target


def test_shuffling_is_not_sampling() -> None:
    # ten batches in an epoch: what Poisson would cost, and what shuffled batches are known to cost
    assert epsilon([gaussian(1, 0.1, 10)], 1e-5) == pytest.approx(2.8545, abs=0.011)
    assert epsilon([gaussian(1, 1.0, 1)], 1e-5) == pytest.approx(4.38, abs=0.005)
    assert epsilon([gaussian(1, 0.1, 100)], 1e-5) == pytest.approx(7.05, abs=0.01)
    assert epsilon([gaussian(1, 1.0, 10)], 1e-5) == pytest.approx(17.86, abs=0.005)


@pytest.mark.parametrize(
    ("rate", "noise", "local", "rounds", "product", "right"),
    [(0.01, 2, 20, 100, 0.90, 8.92)],
)
def test_client_rate_times_batch_rate_is_no_rate(
    rate: float, noise: float, local: int, rounds: int, product: float, right: float
) -> None:
    # one coin a round for all local steps, not one for each: the steps compose first
    assert epsilon([gaussian(noise, rate, local * rounds)], 1e-5) == pytest.approx(
        product, abs=0.012
    )
    once = gaussian(noise / math.sqrt(local), rate, rounds)
    assert epsilon([once], 1e-5) == pytest.approx(right, abs=0.012)


def test_laplace_adds_its_pure_epsilon() -> None:
    both = [gaussian(2, 1, 3), Event("laplace", 4, steps=6)]
    assert epsilon(both, 1e-5) == pytest.approx(epsilon(both[:1], 1e-5) + 1.5)
    assert epsilon([Event("laplace", 4, steps=6)], 0) == 1.5


def test_edges() -> None:
    for accountant in ("prv", "rdp"):
        assert epsilon([], 1e-5, accountant) == 0
        assert epsilon([gaussian(0, 0.1, 5)], 1e-5, accountant) == math.inf
        assert epsilon([Event("laplace", 0)], 1e-5, accountant) == math.inf
        assert epsilon([gaussian(1, 0.5, 2)], 0.99, accountant) == 0


@pytest.mark.parametrize(
    "run",
    [
        ([gaussian(0.05, 0.01, 10)], 1e-5),  # epsilon in the hundreds
        ([gaussian(1e-3, 0.5, 10)], 1e-5),  # in the millions
        ([gaussian(1, 0.01, 1000)], 1e-30),  # a delta that floating point cannot resolve
        ([gaussian(1, 1e-12, 10)], 1e-5),  # hardly any sampling
        ([gaussian(1e4, 0.5, 10)], 1e-5),  # hardly any cost
        ([gaussian(20, 1e-4, 3)], 1e-2),  # none at all by RDP
        ([gaussian(0.5, 0.1, 100000)], 1e-5),  # more grid points than there is memory for
    ],
)
def test_extremes_get_a_bound_that_holds(run: tuple[list[Event], float]) -> None:
    events, delta = run
    (event,) = events
    found = epsilon(events, delta)
    assert 0 <= found <= epsilon([gaussian(event.noise, 1, event.steps)], delta)
    assert found <= max(bounds.LEAST, epsilon(events, delta, "rdp"))
    assert found >= epsilon([gaussian(event.noise, event.rate, 1)], delta) * 0.9 - 0.011


def test_noise_below_the_range_of_floats_is_no_privacy() -> None:
    assert epsilon([gaussian(1e-200, 0.5, 10)], 1e-5) == math.inf


def test_a_broken_prv_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = [gaussian(1.01, 0.1, 100)]
    monkeypatch.setattr(bounds, "sampled_delta", lambda *_: 1.0 * (_[1] < 50))
    assert epsilon(run, 1e-5) == epsilon(run, 1e-5, "rdp")


def test_one_release_without_noise_is_no_privacy_whatever_the_others_have() -> None:
    for accountant in ("prv", "rdp"):
        assert epsilon([gaussian(0, 0.5), gaussian(5, 0.5)], 1e-5, accountant) == math.inf
        assert epsilon([gaussian(0), gaussian(5)], 1e-5, accountant) == math.inf


def test_a_prv_below_what_the_dearest_of_its_parts_costs_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, delta = ((0.7, 0.1, 2), (5.0, 0.1, 2)), 1e-5
    dear, cheap = (bounds._one_step(s, q, delta) for s, q, _ in run)
    assert cheap < 0.5 < 2 < dear
    for broken, believed in ((1.0, False), (dear + 0.1, True)):
        monkeypatch.setattr(bounds, "epsilon_of", lambda *_, found=broken: found)
        assert math.isfinite(bounds.prv.__wrapped__(run, delta)) == believed


def test_no_warning_escapes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epsilon([gaussian(300, 0.01, 3), gaussian(2, 1, 1)], 1e-5)
        epsilon([gaussian(0.3, 0.9, 7)], 1e-2, "rdp")


def test_merge_ignores_order() -> None:
    a, b = gaussian(1, 0.1, 2), gaussian(2, 0.1, 1)
    assert merge([a, b, a]) == merge([b, a, a]) == (gaussian(1, 0.1, 4), gaussian(2, 0.1, 1))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.builds(
            gaussian, st.floats(0.3, 20), st.sampled_from([0.01, 0.2, 1.0]), st.integers(1, 500)
        ),
        min_size=1,
        max_size=3,
    ),
    st.builds(gaussian, st.floats(0.3, 20), st.sampled_from([0.01, 0.2, 1.0]), st.integers(1, 50)),
    st.sampled_from([1e-3, 1e-5, 1e-9]),
)
def test_rdp_never_falls_when_something_is_added(
    run: list[Event], more: Event, delta: float
) -> None:
    if any(e.rate < 1 for e in run):  # else the closed form gives way to RDP, which is looser
        assert epsilon([*run, more], delta, "rdp") >= epsilon(run, delta, "rdp") * (1 - 1e-9)
    assert epsilon(run, delta / 10, "rdp") >= epsilon(run, delta, "rdp") * (1 - 1e-9)


def test_monotone_in_everything() -> None:
    base = epsilon([gaussian(1.2, 0.05, 200)], 1e-5)
    assert epsilon([gaussian(1.3, 0.05, 200)], 1e-5) < base
    assert epsilon([gaussian(1.2, 0.04, 200)], 1e-5) < base
    assert epsilon([gaussian(1.2, 0.05, 190)], 1e-5) < base
    assert epsilon([gaussian(1.2, 0.05, 200)], 1e-4) < base


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mechanism": "uniform"}, "mechanism must be gaussian, laplace or skellam"),
    ({"noise": -1.0}, "noise_multiplier must be a finite number >= 0, got -1.0"),
    ({"noise": math.nan}, "noise_multiplier must be"),
    ({"noise": math.inf}, "noise_multiplier must be"),
    ({"noise": "1"}, "noise_multiplier must be"),
    ({"rate": 0.0}, r"sample_rate must be in \(0, 1\], got 0.0"),
    ({"rate": 1.5}, "sample_rate must be"),
    ({"rate": -0.1}, "sample_rate must be"),
    ({"rate": math.nan}, "sample_rate must be"),
    ({"steps": 0}, "steps must be a positive whole number, got 0"),
    ({"steps": 1.5}, "steps must be"),
    ({"steps": True}, "steps must be"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_events(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Event(**{"mechanism": "gaussian", "noise": 1.0} | options)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 2, math.nan, "x"])
def test_refused_deltas(delta: Any) -> None:
    with pytest.raises(ConfigError, match=r"delta must be in \(0, 1\)"):
        epsilon([gaussian(1)], delta)
    with pytest.raises(ConfigError, match=r"delta must be in \(0, 1\)"):
        calibrate(1, delta, 0.1, 10)


def test_refused_accountants_and_targets() -> None:
    with pytest.raises(ConfigError, match=r"gdp.*less epsilon than was spent"):
        epsilon([gaussian(1)], 1e-5, "gdp")
    with pytest.raises(ConfigError, match="there are prv and rdp"):
        epsilon([], 1e-5, "pld")
    for target in (0, -1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="target_epsilon must be a finite number > 0"):
            calibrate(target, 1e-5, 0.1, 10)
    with pytest.raises(ConfigError, match=r"0\.003501 is the smallest \(rdp accountant\)"):
        calibrate(1e-3, 1e-5, 0.01, 10, "rdp")
    with pytest.raises(ConfigError, match="is the smallest"):
        calibrate(1e-9, 1e-12, 1.0, 10**9)


def independent(kind: str, run: list[Event], relation: str = "ADD_OR_REMOVE_ONE") -> Any:
    neighbours = getattr(dp_accounting.NeighboringRelation, relation)
    accountant = (
        pld.PLDAccountant(neighbours) if kind == "pld" else rdp.RdpAccountant(orders(), neighbours)
    )
    for e in run:
        one = dp_accounting.PoissonSampledDpEvent(e.rate, dp_accounting.GaussianDpEvent(e.noise))
        accountant.compose(one, e.steps)
    return accountant


@pytest.mark.parametrize(
    ("delta", "run"),
    [
        (1e-6, [gaussian(1.1, 0.02, 700)]),
        (1e-3, [gaussian(0.8, 0.2, 20)]),
        (1e-5, [gaussian(3, 0.5, 60)]),
        (
            1e-6,
            [
                gaussian(1, 0.01, 100),
                gaussian(2, 0.02, 50),
                gaussian(1.5, 0.3, 3),
                gaussian(4, 1, 2),
            ],
        ),
        (1e-5, [gaussian(1, 0.1, 7), gaussian(1.1, 0.1, 8), gaussian(1.2, 0.1, 9)]),
    ],
    ids=["low rate", "high rate", "half", "four kinds", "three kinds"],
)
def test_against_an_independent_accountant(delta: float, run: list[Event]) -> None:
    exact = independent("pld", run).get_epsilon(delta)
    by_rdp = independent("rdp", run).get_epsilon(delta)
    own = epsilon(run, delta, "rdp")
    # dp-accounting drops the signs of fractional binomials, so it may lie up to 6 % above Opacus
    assert own <= by_rdp * (1 + 1e-9) + 1e-9
    assert by_rdp <= own * 1.06
    assert own >= exact - 1e-4
    assert -1e-3 <= epsilon(run, delta) - exact <= 0.0115


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [(1, 0.05, 200, 1e-4), (1, 0.1, 100, 1e-3)],
)
def test_replacing_a_unit_costs_more_than_removing_it(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    # why every report names its neighbouring relation: the same run under replace-one
    run = [gaussian(noise, rate, steps)]
    replaced = independent("pld", run, "REPLACE_ONE").get_epsilon(delta)
    assert replaced == pytest.approx({1e-4: 6.1801, 1e-3: 7.7695}[delta], abs=2e-3)
    assert replaced > epsilon(run, delta) * 1.4


def test_gdp_would_have_reported_too_little() -> None:
    from opacus.accountants import GaussianAccountant

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "GDP accounting is experimental")
        wrong = GaussianAccountant()
        wrong.history = [(0.5, 0.01, 1000)]
        claimed = wrong.get_epsilon(1e-5)
    assert claimed == pytest.approx(11.99, abs=0.01)
    assert epsilon([gaussian(0.5, 0.01, 1000)], 1e-5) == pytest.approx(13.37, abs=0.01)


def test_prv_is_not_believed_where_rounding_is_as_large_as_delta() -> None:
    # rounding of the transforms is 3e-12 to 1e-11 in all, by the processor: a figure at 1e-12 means
    # nothing, where masses are not tilted
    run = ((1.5, 0.005, 50_000),)
    for delta in (1e-13, 1e-12, 1e-11):
        for tilt, believed in ((0.0, False), (bounds._tilt(run, delta), True)):
            _, parts = bounds._parts(run, delta, bounds.rdp(run, delta), tilt)
            found = spectrum.epsilon_of(parts, delta, delta / 1000, 5.0)
            assert math.isfinite(found) == believed
        assert found < bounds.prv(run, delta) < bounds.rdp(run, delta)
    assert bounds.prv(run, 1e-9) < bounds.rdp(run, 1e-9)


def test_a_tilted_figure_is_not_believed_either_where_rounding_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, delta = ((1.5, 0.005, 500),), 1e-12
    tilt = bounds._tilt(run, delta)
    for eps, believed in ((spectrum.EPS, True), (1e6 * spectrum.EPS, False)):
        monkeypatch.setattr(spectrum, "EPS", eps)
        bounds._release.cache_clear()
        _, parts = bounds._parts(run, delta, 3.0, tilt)
        assert math.isfinite(spectrum.epsilon_of(parts, delta, 1e-15, 3.0)) == believed
    bounds._release.cache_clear()
