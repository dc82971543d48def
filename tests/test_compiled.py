import sys

import numpy as np
import pytest

from fedtorch.compiled import compiled


def total(x):
    out = 0.0
    for v in x:
        out += v
    return out


@pytest.fixture
def fresh():
    compiled.cache_clear()
    yield
    compiled.cache_clear()


def test_a_loop_is_machine_code_and_gives_the_same(fresh):
    loop = compiled(total)
    x = np.arange(10, dtype=np.float32)
    assert loop is not total and loop(x) == total(x) == 45
    assert loop.signatures  # it was compiled, not interpreted
    assert compiled(total) is loop


def test_nan_and_infinity_are_kept(fresh):
    loop = compiled(total)
    assert np.isnan(loop(np.array([1.0, np.nan, 2.0])))
    assert loop(np.array([1.0, np.inf])) == np.inf


def by_index(x):
    out = 0.0
    for i in range(len(x)):
        out += x[i]
    return out


def by_index_regrouped(x):  # one of its own: what is kept on disk does not know how it was compiled
    out = 0.0
    for i in range(len(x)):
        out += x[i]
    return out


def test_an_exact_loop_adds_in_the_order_written(fresh):
    x = np.tile([1e16, 1.0, -1e16, 1.0], 100)
    assert compiled(by_index, exact=True)(x) == by_index(x) == 1
    assert compiled(by_index_regrouped)(x) == 200  # side by side the ones are not swallowed


def test_without_numba_there_is_none(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled(total) is None


def test_a_loop_with_nowhere_to_be_kept_is_compiled_all_the_same(fresh):
    scope: dict = {}
    exec("def double(x):\n    return x * 2", scope)  # of no file, so numba has no place for it
    assert compiled(scope["double"])(3.0) == 6.0
