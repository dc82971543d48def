import numpy as np
import pytest

from fedtorch.kernels.compile import available

if not available():
    pytest.skip("what is tested here is machine code by numba", allow_module_level=True)
from fedtorch.kernels import products
from fedtorch.kernels.products import W2, W3

DRAWN = np.random.default_rng(0)


def test_the_other_half_of_a_tile_is_the_whole_to_the_bit():
    """Processors of short registers take halves, and results must not hang on the processor."""
    q, some, by = np.uint64(64), np.array([0, 3, 4]), (np.float32(0.9), np.float32(-0.1))
    z, Y = (DRAWN.standard_normal(n * 64).astype(np.float32) for n in (2, 5))
    g, h = DRAWN.standard_normal((2, 5)).astype(np.float32)
    whole, halves, none = np.zeros_like(z), np.zeros_like(z), np.uint64(0)
    products.less_wide(z, (none, q), whole, (none, q), g, h, Y, none, q, some, by)
    for t in (none, W2):
        places = t, q + t
        products._less_two(z, places, halves, places, g, h, Y, t, q, some, by)
    assert np.array_equal(whole, halves) and np.abs(whole).min() > 0


def test_half_of_the_products_of_rows_is_the_whole_to_the_bit():
    q = W3 + np.uint64(5)
    rows = [np.uint64(k) * q for k in range(4)]
    x, X = (DRAWN.standard_normal(n * int(q)) for n in (2, 4))
    found = products.dots(x, rows[0], rows[1], X, *rows, q)
    first = products._dots_two(x, rows[0], rows[1], X, rows[0], rows[1], q)
    last = products._dots_two(x, rows[0], rows[1], X, rows[2], rows[3], q)
    assert found == first[:2] + last[:2] + first[2:] + last[2:]
    assert np.allclose(np.reshape(found, (2, 4)), x.reshape(2, -1) @ X.reshape(4, -1).T)
