import re
import subprocess
from importlib.metadata import version

import fedtorch
from fedtorch.run import versions


def test_versions_are_those_that_are_installed():
    assert versions.installed("fedtorch") == fedtorch.__version__
    assert versions.installed("numpy") == version("numpy")
    assert versions.installed("no-package-of-this-name") is None


def test_the_commit_of_the_source_is_told_and_whether_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "fedtorch" / "run" / "versions.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    source = tmp_path / "source.py"
    source.write_text("1\n")
    assert versions.git_commit() is None

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert versions.git_commit() is None  # nothing is committed yet
    git("add", "source.py")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "no tag takes the commit's place")
    commit = versions.git_commit()
    assert commit and re.fullmatch("[0-9a-f]{40}", commit)
    source.write_text("2\n")
    assert versions.git_commit() == commit + "+"
