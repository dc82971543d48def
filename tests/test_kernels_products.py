import numpy as np
import pytest

from fedtorch.kernels.compile import available

if not available():
    pytest.skip("what is tested here is machine code by numba", allow_module_level=True)
import numba

from fedtorch.kernels import products, tiles
from fedtorch.kernels.products import W2

DRAWN = np.random.default_rng(0)


def test_the_other_half_of_a_tile_is_the_whole_to_the_bit():
    """Processors of short registers take halves, and results must not hang on the processor."""
    q, some, by = np.uint64(64), np.array([0, 3, 4]), (np.float32(0.9), np.float32(-0.1))
    z, Y = (DRAWN.standard_normal(n * 64).astype(np.float32) for n in (2, 5))
    g, h = DRAWN.standard_normal((2, 5)).astype(np.float32)
    whole, halves, none = np.zeros_like(z), np.zeros_like(z), np.uint64(0)
    products.less_four(z, (none, q), whole, (none, q), g, h, Y, none, q, some, by)
    for t in (none, W2):
        places = t, q + t
        products.less_two(z, places, halves, places, g, h, Y, t, q, some, by)
    assert np.array_equal(whole, halves) and np.abs(whole).min() > 0


def blocks(rows: int, across: int):
    """All products of six rows with four, and a step of six rows of weights, in blocks of this size."""
    dots, backward, full = tiles.dots(rows), tiles.backward(rows, across), across * tiles.WIDTH

    @numba.njit
    def run(x, w, v, z, d, a, down, of):
        q, width, zero, four = (
            np.uint64(z.size // 6),
            np.uint64(w.size // 6),
            np.uint64(0),
            np.uint64(4),
        )
        for i in range(0, 6, rows):
            dots(x, v, z, zero, four, width, np.uint64(i), zero, four, q, z.dtype.type(1))
        for t in range(0, width, full):
            for i in range(0, 6, rows):
                m = np.uint64(min(full, width - t))
                keep = w.dtype.type(0.9)
                backward(
                    w,
                    v,
                    d,
                    a,
                    down,
                    of,
                    four,
                    np.uint64(6),
                    width,
                    np.uint64(i),
                    np.uint64(t),
                    m,
                    keep,
                    True,
                )

    return run


def test_blocks_of_any_size_sum_in_the_same_order():
    """How many rows and registers a processor takes at once decides nothing but speed."""
    width, found = 4 * tiles.WIDTH, []
    x, w, d, a = (
        DRAWN.standard_normal(n).astype(np.float32) for n in (6 * width, 6 * width, 24, 4 * width)
    )
    for rows, across in ((1, 1), (2, 2), (3, 4)):
        to, z, down = np.empty_like(w), np.zeros(24, np.float32), np.zeros_like(a)
        blocks(rows, across)(x, to, w, z, d, a, down, np.arange(6, dtype=np.uint64))
        found.append(np.concatenate([to, z, down]))
    assert all(np.array_equal(found[0], f) for f in found)
    X, W, D, A = (v.reshape(-1, n) for v, n in ((x, width), (w, width), (d, 6), (a, width)))
    wanted = [0.9 * W - D.T @ A, X @ W[:4].T + 1, D @ W]
    assert np.allclose(found[0], np.concatenate([v.ravel() for v in wanted]), atol=1e-4)


def named(more: bool):
    """Two rows of sixty-nine columns, in one block or in one and its rest."""
    block, rest = tiles.backward(2, 4, more), tiles.backward(2, 1)

    @numba.njit
    def run(w, d, a, down, of, q):
        three, six, zero, one = np.uint64(3), np.uint64(6), np.uint64(0), w.dtype.type(1)
        start, m, at = np.uint64(1), np.uint64(5), np.uint64(64)
        block(w, w, d, a, down, of, three, six, q, start, zero, m, one, True)
        if not more:
            rest(w, w, d, a, down, of, three, six, q, start, at, m, one, True)

    return run


def test_half_a_register_more_and_rows_by_name_are_the_same_to_the_bit():
    q, found = 4 * tiles.WIDTH + 5, []
    w, d, a, down = (DRAWN.standard_normal(n).astype(np.float32) for n in (6 * q, 18, 3 * q, 3 * q))
    for more in (True, False):
        to, passed = w.copy(), down.copy()
        named(more)(to, d, a, passed, np.array([4, 1, 0], np.uint64), np.uint64(q))
        found.append(np.concatenate([to, passed]))
    W, D, A = w.reshape(6, q), d.reshape(3, 6) * [[1, 1, 0, 0, 0, 0]], a.reshape(3, q)
    wanted = np.concatenate([(W - D.T @ A).ravel(), (down.reshape(3, q) + D @ W).ravel()])
    assert np.array_equal(*found) and np.allclose(found[0], wanted, atol=1e-4)
