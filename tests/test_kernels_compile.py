import ast
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

import fedtorch.kernels
from fedtorch.kernels.compile import (
    COMPILING,
    _text,
    available,
    compiled,
    digest_of,
    loops,
    telling,
    used,
)
from fedtorch.run.console import Remarks

if not available():
    pytest.skip("what is tested here is machine code by numba", allow_module_level=True)
from numba.core.caching import IndexDataCacheFile

from fedtorch.kernels import closing, products, sparse
from fedtorch.privacy.noise.normals import turned

KERNELS = Path(fedtorch.kernels.__file__).parent


def total(x):
    out = 0.0
    for v in x:
        out += v
    return out


@pytest.fixture
def fresh():
    compiled.cache_clear()
    loops.cache_clear()
    yield
    compiled.cache_clear()
    loops.cache_clear()


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


def test_an_exact_loop_adds_in_the_order_written(fresh):
    x = np.tile([1e16, 1.0, -1e16, 1.0], 100)
    assert compiled(by_index, exact=True)(x) == by_index(x) == 1
    assert compiled(by_index)(x) == 200  # side by side the ones are not swallowed


def test_a_version_that_was_not_written_to_the_end_is_not_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "versions.py"

    def run(factor):
        path.write_text(f"def times(x):\n    return x * {factor}\n")
        spec = spec_from_file_location("versions", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return compiled(module.times)(1.0)

    assert run(2.0) == 2
    with monkeypatch.context() as patch:  # killed after the index, before the code
        patch.setattr(IndexDataCacheFile, "_save_data", lambda *args: None)
        assert run(30.0) == 30
    assert run(30.0) == 30


@pytest.mark.parametrize(
    ("changed", "anew"),
    [
        ("compile", {"total", "less", "step", "compress", "turned"}),
        ("vector", {"less", "step", "compress"}),
        ("products", {"less", "step"}),
        ("processor", {"turned"}),
        ("loops", set()),
    ],
)
def test_a_changed_file_is_compiled_anew_with_those_that_call_it_and_nothing_else(
    changed, anew, monkeypatch
):
    loops = {
        f.__name__: f
        for f in (
            total,
            products.less.py_func,
            closing.step.py_func,
            sparse.compress.py_func,
            turned,
        )
    }
    before = {name: digest_of(loop, False) for name, loop in loops.items()}
    assert digest_of(total, True) != before["total"]
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + b"#" * (p.stem == changed))
    _text.cache_clear()
    found = {name: digest_of(loop, False) for name, loop in loops.items()}
    _text.cache_clear()
    assert {name for name in loops if found[name] != before[name]} == anew


def test_whatever_a_file_of_loops_imports_from_beside_it_is_found():
    for path in [p for p in KERNELS.glob("*.py") if "@machine_code" in p.read_text("utf-8")]:
        tree = ast.parse(path.read_text("utf-8"))
        named = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        named |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        beside = {str(n).rpartition(".")[2] for n in named if str(n).startswith("fedtorch")}
        assert beside and beside <= {p.stem for p in used(path.read_bytes())}


def test_the_first_loop_to_be_compiled_is_told_once_and_kept_in_the_cache_folder(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tried.py"
    path.write_text("def one(x):\n    return x + 1\ndef two(x):\n    return x + 2\n")

    def begun():
        compiled.cache_clear()
        telling.cache_clear()
        spec = spec_from_file_location("fedtorch.tried", path)
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "fedtorch.tried", module)
        spec.loader.exec_module(module)
        return module

    with Remarks():
        first = begun()
        assert compiled(first.one)(1) == 2 and compiled(first.two)(1) == 3
        told = capsys.readouterr().out
        assert compiled(begun().one)(1) == 2  # it is there by now
    assert COMPILING in told and f"kept in {tmp_path / 'cache/fedtorch/loops'}" in told
    assert capsys.readouterr().out == ""
    assert len(list((tmp_path / "cache/fedtorch/loops").rglob("tried.*.nbi"))) == 2
    assert not list(tmp_path.glob("__pycache__/*.nbi"))


def test_loops_left_to_python_are_none_at_all(fresh, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # thousands of times slower
    assert compiled(total) is None and loops("fedtorch.kernels.loops") is None


def test_without_numba_there_is_none(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled(total) is None


def test_a_loop_with_nowhere_to_be_kept_is_compiled_all_the_same(fresh):
    scope: dict = {}
    exec("def double(x):\n    return x * 2", scope)  # of no file, so numba has no place for it
    assert compiled(scope["double"])(3.0) == 6.0


def test_a_numba_that_cannot_be_imported_is_none(fresh, monkeypatch, tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.5 or less')\n")
    for name in [m for m in sys.modules if m.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert not available() and compiled(total) is None
