"""PRV by a few frequencies: against the whole grid in longer numbers, Opacus's and Google's accountants."""

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.fft
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtorch.privacy.accounting import bounds, spectrum
from fedtorch.privacy.accounting.gaussian import gaussian_epsilon
from fedtorch.privacy.accounting.spectrum import epsilon_of, release


def whole_grid(parts: Any, pmfs: list[Any], delta: float) -> float:
    """Epsilon as the paper has it, every place summed, with 64 bits in place of 53."""
    size, first, mesh = parts[0][0].size, parts[0][0].first, parts[0][0].mesh
    product = np.ones(1, np.clongdouble)
    for (_, steps), pmf in zip(parts, pmfs, strict=True):
        one = scipy.fft.rfft(pmf.astype(np.longdouble) / pmf.astype(np.longdouble).sum())
        product = product * spectrum._power(one, steps)
    total = sum(t for _, t in parts)
    p = np.roll(scipy.fft.irfft(product, size), (total - 1) * first % size)
    x = first * mesh + sum(o.shift * t for o, t in parts) + mesh * np.arange(size, dtype=float)
    p, x = p[x > -1], x[x > -1]
    mass, weighed = p[::-1].cumsum()[::-1], (p * np.exp(-x))[::-1].cumsum()[::-1]
    place = int(np.searchsorted(np.exp(x) * weighed - mass, -delta))
    return float(np.log((mass[place] - delta) / weighed[place]))


RUNS = [
    (((1.0, 1 / 6, 126),), 1e-5),
    (((0.5, 1e-3, 2),), 1e-6),  # hardly any frequency is small
    (((4.0, 0.01, 3000),), 1e-7),
    (((0.8, 0.3, 40), (2.0, 1.0, 5)), 1e-5),
    (((0.745, 0.0687, 15),), 1e-10),
]


@pytest.mark.parametrize(("run", "delta"), RUNS)
def test_a_few_frequencies_say_what_the_whole_grid_says(
    run: bounds.Run, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pmfs: list[Any] = []
    transform = np.fft.rfft
    monkeypatch.setattr(np.fft, "rfft", lambda x: pmfs.append(x.copy()) or transform(x))
    steps = sum(t for _, _, t in run)
    mesh = 0.01 / math.sqrt(steps * math.log(12000 / delta) / 2)
    parts = [(release(s, q, 25.0, mesh, 1), t) for s, q, t in run]
    found = epsilon_of(parts, delta, delta / 1000, 5.0)
    exact = whole_grid(parts, pmfs, delta * 0.999)
    assert -1e-4 * 0.01 <= found - exact <= 0.05 * 0.01
    # where the search starts does not matter
    for start in (0.0, 24.0, -3.0):
        assert epsilon_of(parts, delta, delta / 1000, start) == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize(("run", "delta"), RUNS[:-1])
def test_opacus_says_the_same(run: bounds.Run, delta: float) -> None:
    from opacus.accountants import PRVAccountant

    theirs = PRVAccountant()
    theirs.history = list(run)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):  # advice on orders
        found = theirs.get_epsilon(delta)
    assert bounds.prv(run, delta) == pytest.approx(found, abs=1e-3)


def from_below(run: bounds.Run, delta: float) -> float:
    """Google's accountant with every rounding in favour of privacy: less than the truth."""
    whole = None
    for s, q, t in run:
        one = pld.from_gaussian_mechanism(
            s,
            sampling_prob=q,
            pessimistic_estimate=False,
            value_discretization_interval=1e-3,
            use_connect_dots=False,
        ).self_compose(t)
        whole = one if whole is None else whole.compose(one)
    assert whole is not None
    return float(whole.get_epsilon_for_delta(delta))


@settings(max_examples=12, deadline=None)
@given(st.floats(0.6, 8), st.floats(-4, -0.1), st.integers(1, 300), st.floats(-9, -3))
def test_epsilon_is_never_below_the_truth(
    noise: float, log_rate: float, steps: int, log_delta: float
) -> None:
    run, delta = ((noise, 10**log_rate, steps),), 10**log_delta
    assert bounds.prv(run, delta) >= from_below(run, delta) - 1e-6


def test_shifts_longer_than_the_grid_are_wrapped_the_right_way() -> None:
    # one release is worth -rate but for a rare loss, far finer than the mesh: 6,509,211 such shifts
    run, delta = ((0.333, 2.83e-6, 6_509_211),), 2e-7
    (noise, rate, steps), mesh = run[0], 1e-3
    one = pld.from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=mesh)
    google = float(one.self_compose(steps).get_epsilon_for_delta(delta))
    assert google - 0.05 <= bounds.prv(run, delta) < google + 0.3
    # the shift goes the other way: what is worth least must not count as most
    run, delta = ((0.3866, 6.23e-6, 5_571_028),), 1.16e-4
    assert bounds.prv(run, delta) < bounds.rdp(run, delta)


@pytest.mark.parametrize("run", [((0.3, 6e-3, 1),), ((0.2, 5e-4, 3),)])
def test_a_run_that_tells_less_than_delta_costs_no_more_than_the_error(run: bounds.Run) -> None:
    assert 0 <= bounds.prv(run, 2e-2) <= 0.01


def test_epsilon_rises_with_every_step() -> None:
    found = [bounds.prv(((1.0, 0.1, t),), 1e-5) for t in range(1, 300)]
    assert all(b > a for a, b in itertools.pairwise(found))


def test_losses_that_are_all_beyond_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        release(1e-3, 1.0, 20.0, 0.1, 1)


def test_the_mean_is_the_integral() -> None:
    noise, rate = 0.7, 0.2
    z = np.linspace(-10, 11, 2_000_001)
    density = (1 - rate) * np.exp(-z * z / 2 / noise**2) + rate * np.exp(
        -((z - 1) ** 2) / 2 / noise**2
    )
    losses = spectrum._loss(z, noise, rate)
    inside = (losses > -0.1) & (losses < 3)
    exact = (density * losses)[inside].sum() / density[inside].sum()
    assert spectrum._mean(noise, rate, -0.1, 3) == pytest.approx(exact, abs=1e-5)
    assert spectrum._mean(noise, rate, -50, 50) == pytest.approx(
        (density * losses).sum() / density.sum(), abs=1e-10
    )


def tails(product: Any, size: int, places: Any) -> Any:
    """What lies at each of these places and beyond, by all frequencies, in long numbers."""
    k = np.arange(1, len(product))
    twice = np.where(2 * k == size, 1, 2) / np.longdouble(size)
    angles = 2 * np.longdouble(math.pi) / size * k
    weighed = product[1:] * twice / (1 - np.exp(1j * angles))
    turns = np.exp(2j * math.pi / size * (k * places[:, None] % size)) - 1
    return product[0].real * (size - places) / size + (turns * weighed).sum(1).real


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(1.5, 0.005, 50_000), (0.6, 1e-4, 20_000), (0.745, 0.0687, 15), (4.0, 1.0, 7)],
)
def test_no_transform_is_off_by_more_than_the_bound(
    noise: float, rate: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pmfs: list[Any] = []
    transform = np.fft.rfft
    monkeypatch.setattr(np.fft, "rfft", lambda x: pmfs.append(x.copy()) or transform(x))
    one = release(noise, rate, 25.0, 0.01 / math.sqrt(steps * 15), max(1, steps // 2))
    count = min(len(one.spectrum), 500)
    exact = scipy.fft.rfft(pmfs[0].astype(np.longdouble))
    assert np.abs(one.spectrum - exact[: len(one.spectrum)]).max() < one.rounding
    # and what comes of it is within the bound on all sums, which is not a hundred times too wide
    off = spectrum._power(one.spectrum[:count], steps) - spectrum._power(exact[:count], steps)
    bound = spectrum._Tails(one.spectrum[:count], one.size, one.mesh, 0.0).most(
        spectrum._off([(one, steps)], count)
    )
    wrong = np.abs(tails(off, one.size, np.arange(0, one.size, one.size // 997))).max()
    assert wrong < bound < max(300 * wrong, 10 * steps * spectrum.EPS)


def test_what_rounding_may_be_is_taken_off_delta() -> None:
    mesh = 0.01 / math.sqrt(1000 * math.log(12e8) / 2)
    one = release(1.0, 0.01, 20.0, mesh, 1)
    found, blurred = (
        epsilon_of([(o, 1000)], 1e-5, 1e-9, 5.0) for o in (one, one._replace(rounding=1e-9))
    )
    bounded = [one._replace(rounding=r) for r in (0.0, 1e-9)]
    tail = spectrum._Tails(one.spectrum, one.size, mesh, 0.0)
    taken = [tail.most(spectrum._off([(o, 1000)], len(one.spectrum))) for o in bounded]
    assert taken[0] == 0 and 1e-6 < taken[1] < 5e-6
    assert blurred > found + 0.01
    assert blurred == pytest.approx(epsilon_of([(one, 1000)], 1e-5 - taken[1], 1e-9, 5.0), abs=1e-6)
    # where it could be half of delta, nothing is said
    assert epsilon_of([(one._replace(rounding=5e-9), 1000)], 1e-5, 1e-9, 5.0) == math.inf


def test_a_delta_below_the_rounding_error_gives_an_infinite_epsilon() -> None:
    mesh = 0.01 / math.sqrt(1000 * math.log(12e14) / 2)
    one = release(1.0, 0.01, 20.0, mesh, 1)
    assert epsilon_of([(one, 1000)], 1e-16, 1e-19, 5.0) == math.inf


@pytest.mark.parametrize("log_delta", [-12, -15, -30, -60])
def test_far_out_a_tilted_figure_is_the_exact_one(log_delta: int) -> None:
    # without sampling there is a closed form; the grid knows nothing of it
    run, delta = ((10.0, 1.0, 100),), 10.0**log_delta
    exact = gaussian_epsilon(1.0, delta)
    assert exact + 0.0099 <= bounds.prv(run, delta) <= exact + 0.0105 + exact / 2000


@pytest.mark.parametrize("tilt", [1.0, 2.5, 3.5])
def test_any_tilt_gives_the_same(tilt: float) -> None:
    run, delta = ((1.0, 0.05, 200),), 1e-8
    found = []
    for t in (0.0, tilt):
        _, parts = bounds._parts(run, delta, 7.0, t)
        found.append(spectrum.epsilon_of(parts, delta, delta / 1000, 7.0))
        tails, _ = spectrum._composed(parts, delta / 1000)
        found.append(tails.delta(5.0))
    assert found[0] == pytest.approx(found[2], abs=2e-3)
    assert found[1] == pytest.approx(found[3], rel=1e-4)


@pytest.mark.parametrize("log_delta", [-12, -20])
def test_far_out_a_sum_of_masses_says_the_same(log_delta: int) -> None:
    """Convolved without transforms: positive numbers keep their digits, however small."""
    (noise, rate, steps), delta, mesh = (1.0, 0.3, 8), 10.0**log_delta, 0.01
    found = bounds.prv(((noise, rate, steps),), delta)
    edges = np.arange(-40, 3000) * mesh
    masses = -np.diff(
        spectrum._beyond(edges, noise, rate)
    )  # losses rounded down: less than the truth
    for _ in range(3):
        masses = np.convolve(masses, masses)
    loss = (np.arange(len(masses)) - 40 * steps) * mesh

    def below(e: float) -> float:
        return float((masses * -np.expm1(e - loss))[loss > e].sum())

    assert below(found) <= delta < below(found - 0.02 - steps * mesh)
