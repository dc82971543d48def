"""Words to normals: both ways give the same, and it is the normal law out to its tail."""

import math
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedtorch.kernels.compile import available, compiled
from fedtorch.kernels.processor import converts
from fedtorch.privacy.noise import normals

EXACT = np.longdouble
PI = 4 * np.arctan(EXACT(1))


@pytest.fixture(params=["machine code", "NumPy"])
def way(request, monkeypatch):
    if request.param == "machine code" and not available():
        pytest.skip("without numba there is no loop")
    if request.param == "NumPy":
        monkeypatch.setattr(normals, "compiled", lambda loop, exact: None)
    return request.param


def words(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, n + n % 2, dtype=np.uint64)


def drawn(given, n=None, std=1.0):
    """Cosines and sines, float64."""
    row = np.zeros(len(given) if n is None else n)
    normals.add(given.copy(), row, std)
    return np.split(row, [-(-len(row) // 2)])


def rounded_uniform(given):
    return (given >> np.uint64(1)).astype(np.float64) * 2.0**-63 + 2.0**-64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 15, 16, 17, 40, 4099, 60_000])
def test_compiled_loop_and_numpy_give_the_same_numbers(n, dtype, monkeypatch):
    given, start = words(n), np.linspace(-1, 1, n).astype(dtype)
    machine, numpy = start.copy(), start.copy()
    normals.add(given.copy(), machine, 0.7)
    monkeypatch.setattr(normals, "compiled", lambda loop, exact: None)
    normals.add(given.copy(), numpy, 0.7)
    assert n == 0 or np.any(machine != start)
    if dtype == np.float64:
        assert np.allclose(machine, numpy, rtol=1e-14, atol=1e-14)
    else:  # the same float64 but for its last digits: the same float32, or the next
        assert np.all(np.abs(machine - numpy) <= np.spacing(np.abs(numpy)))
        assert np.sum(machine != numpy) < 10


def test_by_hand(way):
    angles, lengths = [2**61, 2**63, 3 * 2**62, 2**62], [2**63, 2**62, 0, 5]
    cosines, sines = drawn(np.array(angles + lengths, dtype=np.uint64), std=2.0)
    for k in range(4):
        u = (lengths[k] >> 1) / 2**63 + 2.0**-64
        r, angle = 2 * math.sqrt(-2 * math.log(u)), 2 * math.pi * angles[k] / 2**64
        assert cosines[k] == pytest.approx(r * math.cos(angle), rel=1e-12, abs=1e-12)
        assert sines[k] == pytest.approx(r * math.sin(angle), rel=1e-12, abs=1e-12)


def test_the_tail_reaches_beyond_nine_where_torch_stops_before_six(way):
    largest = drawn(np.zeros(2, np.uint64))[0][0]
    assert largest == pytest.approx(math.sqrt(2 * 64 * math.log(2)), rel=1e-15)
    assert largest > 9
    assert math.sqrt(2 * 24 * math.log(2)) < 5.78  # 24 bits of a float32 uniform


def test_the_largest_uniform_is_one_and_gives_zero(way):
    both = drawn(np.array([2**60, 2**64 - 1], np.uint64))
    assert both[0] == both[1] == 0


def test_radii_are_right_to_the_last_digits(way):
    assert np.finfo(EXACT).eps < 1e-18  # or there is nothing to measure against
    n = 1 << 18
    lengths, shifts = words(n), words(n, 1) % np.uint64(64)
    lengths[::3] >>= shifts[::3]  # near u = 0
    lengths[1::3] = ~(lengths[1::3] >> shifts[1::3])  # near u = 1
    u = rounded_uniform(lengths)
    radii, none = drawn(np.concatenate([np.zeros(n, np.uint64), lengths]))
    assert not none.any()
    true = np.sqrt(-2 * np.log(u.astype(EXACT)))
    some = u < 1
    assert np.all(radii[~some] == 0) and true[some].min() < 2e-8 and true.max() > 9.4
    error = np.abs(radii[some] / true[some] - 1).max()
    # half of the logarithm's 4e-16, and the root's own rounding
    assert error < 4e-16 / 2 + 2.0**-53


def test_angles_are_right_to_the_last_digits(way):
    n = 1 << 18
    angles = words(n)
    angles[:64] = np.arange(64, dtype=np.uint64) << np.uint64(58)  # all the borders
    angles[64:128] = angles[:64] - np.uint64(1)
    lengths = np.full(n, 0x123456789ABCDEF0, np.uint64)
    radius = EXACT(drawn(np.array([0, lengths[0]], np.uint64))[0][0])
    cosines, sines = drawn(np.concatenate([angles, lengths]))
    turned = 2 * PI * (angles.astype(np.int64).astype(EXACT) * EXACT(2) ** -64)
    for got, true in ((cosines, np.cos(turned)), (sines, np.sin(turned))):
        # 3e-16, by the tangent of the half 8e-16, and the rounding of the product with the radius
        error = np.abs(got / radius - true).max()
        assert error < (3e-16 if way == "machine code" else 8e-16) + 2.0**-53


@pytest.fixture(scope="module")
def million():
    return words(1 << 20, 7)


def test_moments_and_tail_are_those_of_the_normal_law(way, million):
    x = np.concatenate(drawn(million))
    n = len(x)
    for power, mean, square in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105), (6, 15, 10395)):
        spread = math.sqrt((square - mean**2) / n)
        assert abs(np.mean(x**power) - mean) < 4 * spread
    assert stats.kstest(x, "norm").pvalue > 1e-3
    for beyond in (2.0, 3.0, 4.0):
        for side in (x, -x):
            count = int((side > beyond).sum())
            assert stats.binomtest(count, n, stats.norm.sf(beyond)).pvalue > 1e-3


def test_the_two_of_a_pair_are_independent(way, million):
    c, s = drawn(million)
    n = len(c)
    for f, g in ((c, s), (c**2, s**2), (np.abs(c), s), (c, np.abs(s))):
        assert abs(np.corrcoef(f, g)[0, 1]) < 4 / math.sqrt(n)
    edges = stats.norm.ppf(np.linspace(0, 1, 13))
    counts, _, _ = np.histogram2d(c, s, bins=[edges, edges])  # 144 cells, equally likely
    assert stats.chisquare(counts.flatten()).pvalue > 1e-3
    neighbours = np.concatenate([c[:-1] * c[1:], s[:-1] * s[1:]])
    assert abs(neighbours.mean()) < 4 / math.sqrt(len(neighbours))


def test_far_tails_have_their_share(way):
    # uniforms below 2^-20: radii beyond 5.2, whose squares less that are exponential again
    n = 1 << 16
    given = words(2 * n, 3)
    given[n:] >>= np.uint64(20)
    c, s = drawn(given)
    excess = (c**2 + s**2) / 2 - 20 * math.log(2)
    assert stats.kstest(excess, "expon").pvalue > 1e-3
    assert stats.kstest(np.arctan2(s, c) / (2 * math.pi) + 0.5, "uniform").pvalue > 1e-3


def test_only_the_row_is_written_also_where_it_has_gaps(way):
    for n in (1, 6, 7):
        given, table = words(n), np.zeros((n + 2, 3), np.float32)
        normals.add(given.copy(), table[1:-1, 1], 1.0)
        assert np.array_equal(table[1:-1, 1], np.concatenate(drawn(given, n)).astype(np.float32))
        table[1:-1, 1] = 0
        assert not table.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 40, 4099])
def test_what_a_noised_row_is_added_to_grows_as_by_two_passes(way, n, dtype):
    given, row = words(n), np.linspace(-1, 1, n).astype(dtype)
    table = np.full((2, n), 0.3, dtype)
    inner, two = table[1], table[1].copy()
    normals.add(given.copy(), row.copy(), 0.7, (inner, -0.01))
    normals.add(given.copy(), row, 0.7)
    two += dtype(-0.01) * row
    # of a product and a sum in one instruction the first is not rounded
    assert np.all(np.abs(inner - two) <= np.spacing(np.abs(two)))
    assert np.all(table[0] == dtype(0.3))


def test_a_row_is_added_to_as_many_numbers_only(way):
    with pytest.raises(ValueError, match="3 numbers cannot be added to 2"):
        normals.add(words(3), np.zeros(3), 1.0, (np.zeros(2), 1.0))


@pytest.mark.parametrize("given", [0, 2, 3, 6])
def test_another_number_of_words_than_needed_is_refused(way, given):
    with pytest.raises(ValueError, match=f"3 normals cannot be made of {given} words"):
        normals.add(words(6)[:given], np.zeros(3), 1.0)


@pytest.mark.skipif(not available(), reason="without numba there is no loop")
def test_the_loop_is_compiled_and_takes_pairs_side_by_side():
    from llvmlite.binding import get_host_cpu_features
    from numba import njit

    normals.add(words(4), np.zeros(4, np.float32), 1.0)
    assert compiled(normals.turned, exact=True).signatures and normals.way() == "a compiled loop"
    # of those that were kept there is no listing
    logs, turns = (njit(f, error_model="numpy") for f in (normals.logarithms, normals.turned))
    row, given = np.zeros(4, np.float32), words(4)
    magic, powers = None if converts() else normals.MAGIC, (normals.COS, normals.SIN)
    logs(given, magic, normals.LOG)
    turns(given, row, 1.0, magic, None, None, *powers)
    turns(given, row, 1.0, magic, np.zeros(4, np.float32), 0.1, *powers)
    found = [("divpd", logs.inspect_asm()), ("sqrtpd", turns.inspect_asm())]
    assert [len(listings) for _, listings in found] == [1, 2]
    for operation, listings in found:
        for listing in listings.values():
            assert re.search(operation, listing) or not get_host_cpu_features().get("avx2")


@pytest.mark.skipif(not available(), reason="without numba there is no loop")
def test_processors_with_and_without_an_instruction_to_convert_draw_the_same_bits(monkeypatch):
    n = 20_001
    given, rows = words(n), np.zeros((2, n))
    given[:64] = np.arange(64, dtype=np.uint64) << np.uint64(
        58
    )  # borders of both halves, and of the sign
    given[64:128] = given[:64] - np.uint64(1)
    given[10_001:] = np.roll(given[:10_001], 3)
    for row, can in zip(rows, (True, False), strict=True):
        monkeypatch.setattr(normals, "converts", lambda can=can: can)
        normals.add(given.copy(), row, 1.0)
    assert rows.any(1).all() and rows[0].tobytes() == rows[1].tobytes()


def test_without_numba_numpy_does_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.cache_clear()
    try:
        assert normals.way() == "NumPy"
        given = words(9)
        one, other = np.zeros(9), np.zeros(9)
        normals.add(given.copy(), one, 2.0)
        normals.passes(given.copy(), other, 2.0)
    finally:
        compiled.cache_clear()
    assert one.all() and np.array_equal(one, other)


def test_the_coefficients_can_be_derived_again():
    path = Path(__file__).parents[1] / "tools" / "coefficients.py"
    spec = spec_from_file_location(path.stem, path)
    tool = module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name, found in tool.coefficients().items():
        assert getattr(normals, name) == found
