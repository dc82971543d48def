"""The mirror counts right, and what keeps the rooms apart holds."""

from pathlib import Path

import pytest

from tools import shape

HERE = Path(__file__).parents[1]
TEXTS = shape.sources(HERE)


@pytest.fixture
def tiny(tmp_path):
    """Two rooms that import each other, a third that is imported, one long function."""
    files = {
        "fedtorch/__init__.py": "from fedtorch.a.one import f\n",
        "fedtorch/a/__init__.py": "",
        "fedtorch/a/one.py": '"""Doc."""\nfrom fedtorch.b import two\ndef f():\n    # why\n    return 1\n',
        "fedtorch/b/__init__.py": "",
        "fedtorch/b/two.py": "def f():\n    from fedtorch.a import one\n    import fedtorch.c.three\n",
        "fedtorch/c/__init__.py": "",
        "fedtorch/c/three.py": "f: int = 3\n\n\nclass G:\n    def long(self):\n"
        + "        pass\n" * 40,
        "README.md": "short\n" + "word " * 25 + "\n| " + "cell " * 30 + "|\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_mirror_of_a_tiny_house(tiny):
    texts = shape.sources(tiny)
    assert shape.core(texts) == ["__init__"]
    assert shape.rooms(texts) == {"a": {"b"}, "b": {"a", "c"}, "c": set()}
    assert shape.cycles(shape.rooms(texts)) == [["a", "b"]]
    assert shape.long_functions(texts) == ["c/three.long (41)"]
    assert shape.shared_names(texts) == {"f": ["a/one", "b/two", "c/three"]}
    assert shape.long_lines(tiny) == ["README.md:2 (125)"]
    assert shape.comments_to_code({"a": texts["a/one"]}) == pytest.approx(1 / 3)


def test_classes_of_a_room_and_who_names_them():
    texts = {
        "plans/base": "class Plan: ...\nclass Own(Plan): ...\n",
        "plans/more": "class Far(Own): ...\nclass Other: ...\n",
        "server": '"""Own is a plan."""\n',
        "client": "from fedtorch import plans\nx = plans.Far()\n",
        "names": "from fedtorch.plans.base import Own\n",
    }
    assert shape.concrete(texts, "plans", "Plan") == {"Own", "Far"}
    assert shape.naming(texts, {"Own", "Far"}, ("plans", "names")) == {"client"}


def test_a_walk_counts_files_and_changes(tmp_path):
    (tmp_path / "one.py").write_text("def f(g):\n    return g(), g()\n")
    (tmp_path / "two.py").write_text("def g():\n    return h()\ndef h():\n    return 1\n")
    spaces = []
    for name in ("one.py", "two.py"):
        space: dict = {}
        exec(compile((tmp_path / name).read_text(), str(tmp_path / name), "exec"), space)
        spaces.append(space)
    files, moves = shape.walked(lambda: spaces[0]["f"](spaces[1]["g"]), tmp_path)
    assert {Path(f).name for f in files} == {"one.py", "two.py"}
    assert moves == 1  # one calls two, again and again


def test_no_rooms_import_each_other():
    assert shape.cycles(shape.rooms(TEXTS)) == []


DEFAULTS = {  # where what is left out has to be called something
    "Privacy": set(),
    "Strategy": {"recipe", "run/options", "sites/offer"},
}


@pytest.mark.parametrize(("where", "base"), [("privacy", "Privacy"), ("strategies", "Strategy")])
def test_no_plan_and_no_strategy_is_named_outside_its_room(where, base):
    names = shape.concrete(TEXTS, where, base) - {"Nothing"}  # the plan of a run without one
    assert len(names) >= 3
    assert shape.naming(TEXTS, names, (where, "run/names", "__init__")) <= DEFAULTS[base]
