"""The documents are true: their Python runs, their commands parse, their links lead somewhere."""

import doctest
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

import fedtorch
from conftest import weights
from fedtorch import Local, privacy
from fedtorch.__main__ import COMMANDS
from fedtorch.commands.train import train_module
from fedtorch.engines import Processes
from fedtorch.run import cli, objects, search, sweep
from fedtorch.run.names import CHOICES
from tools import shape

ROOT = Path(__file__).parents[1]
LESSONS = {
    "README.md": 1,
    "docs/index.md": 2,
    "docs/first-run.md": 5,
    "docs/own-data.md": 8,
    "docs/choose.md": 3,
    "docs/private.md": 5,
    "docs/audit.md": 5,
    "docs/write-strategy.md": 4,
    "docs/stop-resume.md": 8,
    "docs/watch.md": 3,
    "docs/report.md": 8,
    "docs/lora.md": 4,
}
"""Pages that test_docs_commands follows from top to bottom, and how many steps each has at least."""
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
FOLLOWED = [ROOT / page for page in LESSONS]
LEFT = [page for page in PAGES if page not in FOLLOWED]
Config = train_module().Config


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", [p for p in LEFT if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_one_after_another(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "documentation"}
    with torch.random.fork_rng():
        for k, block in enumerate(blocks(path, "python")):
            exec(compile(block, f"{path.name} block {k}", "exec"), names)


SHOWN = [p for p in sorted((ROOT / "fedtorch").rglob("*.py")) if ">>> " in p.read_text()]


@pytest.mark.parametrize("path", SHOWN, ids=lambda p: p.stem)
def test_examples_in_docstrings_show_what_comes_out(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted and not done.failed


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_commands_and_settings_are_real(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("rounds = 3\n")
    for block in blocks(path, "toml"):
        assert objects.construct(Config, tomllib.loads(block))
    for line in "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["fedtorch"]:
            assert words[1] in COMMANDS, line
        if path in LEFT:
            parse(words)
        if words[:1] == ["make"]:
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), line


def parse(words: list[str]) -> None:
    """Read a command as it would be before it trains."""
    if words[:2] == ["fedtorch", "train"] and not {"--help", "--resume"} & set(words):
        rest, points = sweep.settings(search.asked(words[2:])[0])
        for point in points or [{}]:
            cli.parse(Config, [*rest, *(w for k, v in point.items() for w in (f"--{k}", v))])


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "path", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: p.name
)
def test_files_that_are_named_are_there_and_hold_what_is_named_with_them(path):
    for name, held in re.findall(r"`([\w/]+(?:\.py|/))`(?: `(\w+)`)?", path.read_text()):
        places = [ROOT / name, ROOT / "fedtorch" / name, ROOT / "tests" / name]
        found = [place for place in places if place.exists()]
        assert found or name in GIVEN, name
        assert not held or re.search(rf"(def|class) {held}\b", found[0].read_text()), (
            f"{name} {held}"
        )


GIVEN = {
    "path/file.py",
    "mine.py",
    "quickstart/task.py",
    "quickstart/client_app.py",
    "quickstart/server_app.py",
    "models/mine.py",
    "checkpoints/",
    "nonprivate/",
    "dist/",
}  # of a reader's own


def test_a_page_names_every_choice():
    text = (ROOT / "docs" / "choose.md").read_text()
    for choice in (
        "dataset",
        "partition",
        "strategy",
        "strategy.server",
        "aggregator",
        "channel",
        "participation",
    ):
        for name in CHOICES[choice]:
            assert f"`{name}`" in text or f"/`{name}`" in text, name


def test_speeds_on_a_page_are_those_of_the_results():
    page = (ROOT / "docs" / "fast-path.md").read_text()
    table = page.partition("## What it gains")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    ratios = re.findall(r"([\d.]+)(?: to ([\d.]+))? x", "".join(rows))
    assert len(rows) == 5 and len(ratios) >= 10
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    measured = {n for pair in re.findall(r"([\d.]+)(?: to ([\d.]+))? x", results) for n in pair}
    assert [n for pair in ratios for n in pair if n not in measured] == []


def test_every_public_name_is_on_a_page_of_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("api*.md"))
    named = {*re.findall(r"^\.\. auto\w+:: (fedtorch[\w.]*)$", pages, re.MULTILINE)}
    plans = {f"fedtorch.privacy.{n}" for n in privacy.__all__ if n.istitle() or not n.isupper()}
    assert {f"fedtorch.{n}" for n in fedtorch.__all__} | plans <= named


def test_no_line_of_prose_is_wider_than_a_page():
    assert shape.long_lines(ROOT) == []


def test_contributing_fits_on_a_page():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80


def test_parts_of_ones_own_train_alike_on_every_engine(tmp_path, monkeypatch):
    parts, run, _ = own()
    assert [len(defined(part)) <= 15 for part in parts] == [True] * len(parts)
    (tmp_path / "own_parts.py").write_text("\n".join(parts))
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("own_parts")
    engines = [
        Local(solver="general"),
        Local(solver="stacked"),
        Local(),
        Processes(workers=1, solver="general"),
    ]
    ends = []
    for engine in engines:
        names = vars(mine) | {"__name__": "documentation", "engine": engine}
        exec(run.replace("clients, recipe)", "clients, recipe, engine=engine)"), names)
        names["server"].close()
        ends.append(weights(names["server"].model))
    for end in ends[1:]:
        assert all(torch.allclose(v, ends[0][k], atol=1e-5) for k, v in end.items())


def own() -> tuple[list[str], str, list[str]]:
    """Parts of one's own, the run that has them all, and set-ups that go on from there."""
    found = blocks(ROOT / "docs" / "own.md", "python")
    at = next(k for k, block in enumerate(found) if block.startswith("import torch"))
    return found[:at], found[at], found[at + 1 :]


def test_set_ups_of_ones_own_are_short_and_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts, run, setups = own()
    names: dict[str, object] = {"__name__": "documentation"}
    exec("\n".join([*parts, run]), names)
    for setup in setups:
        lines = [line for line in setup.splitlines() if line.strip()]
        assert len(lines) <= 15
        exec(setup, names)


def defined(block: str) -> list[str]:
    """Lines of a block with something on them, from its first class or function on."""
    _, _, rest = re.split(r"^(@dataclass|class |def )", block, maxsplit=1, flags=re.MULTILINE)
    return [line for line in rest.splitlines() if line.strip()]
