"""Lessons can be followed: what a page says to type is typed, in its order, in an empty folder."""

import importlib.util
import itertools
import re
import shlex
import socket
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fedtorch.__main__ import main
from fedtorch.run import cli
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.site import Site
from test_docs import LESSONS, parse

ROOT = Path(__file__).parents[1]
NEEDS = {"mlflow": "mlflow", "wandb": "wandb"}
"""Words of a command that want a package of their own, which may not be here."""


def steps(page: str) -> list[tuple[str, str]]:
    """The page's blocks of Python and its lines of shell, in order."""
    text = (ROOT / page).read_text()
    found = []
    for language, block in re.findall(
        r"^```(python|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    ):
        lines = block.replace("\\\n", " ").splitlines() if language == "sh" else [block]
        found += [(language, line) for line in lines if line.strip()]
    return found


def doable(words: list[str]) -> bool:
    """Whether it is a command of ours, and the page before it has made what it reads."""
    if words[:1] != ["fedtorch"]:
        return False
    missing = [v for k, v in NEEDS.items() if k in words and importlib.util.find_spec(v) is None]
    options = dict(itertools.pairwise(words))
    path = options.get("--dataset.path")
    return not missing and (path is None or Path(path).exists())


def quick(words: list[str]) -> list[str]:
    """The command itself, in two rounds where it does not say how many."""
    given = {"--rounds", "--resume", "--help"} & set(words)
    return words if words[1] != "train" or given else [*words, "--rounds", "2"]


@pytest.mark.parametrize("page", LESSONS)
def test_a_lesson_can_be_followed(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("run.toml").write_text("rounds = 2\n")
    names: dict[str, object] = {"__name__": "lesson"}
    done = 0
    with torch.random.fork_rng():
        for k, (language, text) in enumerate(steps(page)):
            words = shlex.split(text, comments=True) if language == "sh" else []
            if language == "python":
                exec(compile(text, f"{page} step {k}", "exec"), names)
            elif not doable(words):
                parse(words)
                continue
            else:
                assert main(quick(words)[1:]) == 0, (text, capsys.readouterr().err)
            done += 1
    sys.modules.pop("mine", None)
    assert done >= LESSONS[page]


def test_every_block_of_the_readme_runs_when_it_is_copied_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = [text for language, text in steps("README.md") if language == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "copied"})


def test_three_hospitals_train_as_their_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    commands = [text.replace("8443", port) for _, text in steps("docs/three-hospitals.md")]
    for text in commands:
        if "import csv" in text:
            exec(text, {})
    keys, serve, *sites, resumed = [
        shlex.split(c)[1:] for c in commands if c.startswith("fedtorch ")
    ]
    assert main(keys) == 0

    def take_part(words: list[str]) -> None:
        with closing(Site(cli.parse(SiteConfig, words))) as site:
            ends.append(site.run())

    ends: list[int] = []
    threads = [threading.Thread(target=take_part, args=(words[1:],)) for words in sites]
    for thread in threads:
        thread.start()
    assert [*map(len, (sites, threads))] == [3, 3] and main(serve) == 0
    for thread in threads:
        thread.join(60)
    assert ends == [0, 0, 0]
    assert "10 rounds" in capsys.readouterr().out
    assert resumed[0] == "serve" and main(resumed) == 0  # nothing is left to do
