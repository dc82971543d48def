"""A new project trains, passes its own test and runs its notebook as it is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_new_project_trains_at_once(fedtorch, tmp_path, monkeypatch):
    code, out, _ = fedtorch("new", "hospitals")
    assert code == 0 and "cd hospitals && fedtorch train --config run.toml --trust-code" in out
    project = tmp_path / "hospitals"
    assert not [p for p in project.rglob("*") if p.is_file() and "@name@" in p.read_text()]
    monkeypatch.chdir(project)
    given = ("--config", "run.toml", "--rounds", "1", "--run-dir", "runs/a")
    code, _, err = fedtorch("train", *given)
    assert code == 2 and "names code to import and run" in err  # as README says
    code, out, _ = fedtorch("train", *given, "--trust-code")
    assert code == 0 and "hospitals: 4 clients, mine" in out and "epsilon" in out

    # its test and its notebook, in a process of their own
    cells = json.loads((project / "look.ipynb").read_text())["cells"]
    (project / "tests" / "test_look.py").write_text(
        "def test_look():\n    exec('''"
        + "\n".join(c["source"] for c in cells if c["cell_type"] == "code")
        + "\nassert history.plot()''', {})\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((), "takes the name of a new folder, but got 0"),
        (("a", "b"), "takes the name of a new folder, but got 2"),
        (("taken",), "taken is there already: choose another name, or empty it"),
        (("1st",), "'1st' is no name: letters, digits"),
        (("file/below",), "cannot be written"),
        (("x", "--force"), "has no option --force"),
    ],
    ids=["none", "two", "taken", "name", "file", "option"],
)
def test_a_project_that_cannot_be_is_one_sentence(fedtorch, tmp_path, given, why):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("")
    code, _, err = fedtorch("new", *given)
    assert code == 2 and why in err and err.count("\n") == 1
    assert (tmp_path / "taken" / "mine.txt").read_text() == "kept"
