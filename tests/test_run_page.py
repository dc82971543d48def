"""The report page: whole, plain text in whatever it shows, and nothing that may not be told."""

import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tomli_w

import fedtorch
from fedtorch.__main__ import main

HOSTILE = "</th><script>alert(1)</script>\"onclick='x' & \u202eevil\x07"
VOID = {"meta", "line", "circle", "polyline", "polygon"}


class Reader(HTMLParser):
    """Refuses what a browser would have to guess, run or fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.heads = [], [], []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "href", "style"), name
            assert "//" not in (value or ""), value
        if tag not in ("meta", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self.heads.append(data)


def read(path):
    text = Path(path).read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and text.startswith("<!doctype html>")
    return reader.heads, " ".join(reader.words), text


def made(folder, rounds=3, clients=("a", "b"), shown=None, mark="", **options):
    """A run's folder as a run leaves it."""
    folder.mkdir(parents=True)
    table = {"dataset": "digits", "model": "small", "strategy": "fedavg", "rounds": 3} | options
    (folder / "config.toml").write_text(tomli_w.dumps(table))
    lines = [{"round": 0, "test_accuracy": 0.1, "test_loss": 2.3}]
    for r in range(1, rounds + 1):
        own = {i: {"loss": 1.0 / r + k, "accuracy": 0.5 + 0.1 * r - 0.2 * k}
               for k, i in enumerate(clients)}  # fmt: skip
        lines.append({
            "round": r, "test_accuracy": 0.2 * r, "test_loss": 2.0 / r,
            f"{mark}train_loss": 2.0 / r, f"{mark}client_loss_min": 1.0 / r, f"{mark}client_loss_max": 3.0,
            f"{mark}cohort": [*clients[: 1 + r % 2]], f"{mark}failed": {},
            f"{mark}validation_accuracy": 0.4, f"{mark}validation_by_client": own,
            **({"privacy_epsilon": 0.5 * r} if mark else {}),
        })  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    holds = {i: [10 + k, [4, 6 + k]] for k, i in enumerate(clients)}
    kept = {"format": "fedtorch report 1", "rounds": 3, "classes": ["no", "yes"], "clients": holds,
            "clients_in_all": len(clients), "confusion": [[8, 2], [1, 9]]}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(kept | (shown or {})))
    (folder / "summary.json").write_text(json.dumps({"rounds": rounds, "seconds": 1.5}))
    packages = {"packages": {"torch": "2.9"}, "python": "3.12"}
    (folder / "about.json").write_text(json.dumps(packages))
    return folder


def test_a_page_has_what_the_folder_has_and_can_be_read(tmp_path):
    heads, words, text = read(fedtorch.report(made(tmp_path / "run")))
    assert heads == [
        "Curves", "Privacy", "Clients, round by round", "Who took part", "Who holds what",
        "What is taken for what", "Options", "Versions",
    ]  # fmt: skip
    assert "17 of 20 test examples" in words and "2 clients with 10 to 11 training" in words
    assert "nothing is noised" in words and "torch" in words and "default-src 'none'" in text
    assert text.count("<svg") == 2 and text.count('class="band') == 1
    assert text.index(">b</th>") < text.index(">a</th>"), "the worst client stands on top"
    assert len(text.encode()) < 40_000


def test_a_page_says_by_which_parts_who_lied_and_what_it_cost(tmp_path):
    stages = [{"name": "topk", "share": 0.05}, {"name": "qsgd"}]
    run = made(
        tmp_path / "run", aggregator="krum", threat="ipm", channel=stages, pace="synchronous"
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for m in lines[1:]:
        m |= {"bytes_up": 2_000_000, "bytes_down": 500_000, "simulated_seconds": 1000 * m["round"]}
        m |= {"liars": ["10", "9"]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    words = read(fedtorch.report(run))[1]
    assert "fedavg, aggregator krum, threat ipm, channel topk and qsgd, done" in words
    assert "MB up 6.00 MB down 1.50 seconds on the clock 3,000" in words
    assert "Made to lie: 9, 10." in words


@pytest.mark.parametrize("where", ["client", "class", "option", "folder", "file"])
def test_whatever_a_name_holds_is_text(where, tmp_path):
    name = HOSTILE if where == "client" else "b"
    folder = tmp_path / ("<b onload=x>&run" if where == "folder" else "run")
    classes = {"classes": ["no", HOSTILE]} if where == "class" else {}
    run = made(
        folder, clients=("a", name), shown=classes, **{"loss": HOSTILE} if where == "option" else {}
    )
    if where == "file":
        (run / "privacy.json").write_text(json.dumps({"unit": HOSTILE, "mechanism": HOSTILE}))
        (run / "about.json").write_text(json.dumps({"python": HOSTILE, "packages": {HOSTILE: "1"}}))
    _, words, text = read(fedtorch.report(run, against=run))
    assert "<script" not in text and "onclick='x'" not in text
    assert ("alert(1)" in words) == (where != "folder")
    assert not {"\u202e", "\x07"} & {*text}


def test_what_is_not_private_says_so_and_strict_has_none_of_it(tmp_path):
    plan = {"name": "sample", "epsilon": 8.0, "delta": 1e-5}
    told = {"unit": "one example", "epsilon_spent": 1.5, "delta": 1e-5, "mechanism": "DP-SGD"}
    run = made(tmp_path / "run", mark="nonprivate_", privacy=plan)
    (run / "privacy.json").write_text(json.dumps(told))
    heads, words, _ = read(fedtorch.report(run))
    assert "At most: epsilon 1.5 at delta 1e-05" in words and "4.5-fold" in words
    assert "At least" not in words and words.count("Not private") == 3
    assert "train loss (not private)" in words and "Who holds what" in heads
    (run / "config.toml").write_text(tomli_w.dumps({"privacy": plan | {"strict": True}}))
    heads, words, _ = read(fedtorch.report(run))
    assert not {"Clients, round by round", "Who holds what", "Sites"} & {*heads}
    told |= {
        "epsilon_replace_one": 3.25,
        "search": {"runs_expected": 10, "epsilon_of_the_released_run_alone": 0.75},
        "user_level": {
            "examples_of_a_person_at_most": 4,
            "epsilon": 6.5,
            "which_is": "a public bound",
        },
    }
    (run / "privacy.json").write_text(json.dumps(told))
    words = read(fedtorch.report(run))[1]
    assert "a whole search costs, 10 runs expected" in words and "alone it would be 0.75" in words
    assert "For a person with up to 4: epsilon 6.5 (a public bound)" in words
    assert "epsilon replace one" in words and "3.25" in words
    told["audit"] = {"epsilon_at_least": 0.7, "confidence": 0.95, "canaries": 1000}
    (run / "privacy.json").write_text(json.dumps(told))
    words = read(fedtorch.report(run))[1]
    assert "At least: epsilon 0.7 , an audit in this run (95% sure, 1,000 canaries)" in words
    assert "nothing that contradicts the claim" in words and "refuted" not in words
    told["audit"]["contradictions"] = ["a step's noise is 0.5 of what is claimed"]
    (run / "privacy.json").write_text(json.dumps(told))
    assert "The claim is refuted: a step's noise is 0.5 of" in read(fedtorch.report(run))[1]


def test_a_federation_has_its_sites_and_no_clients_data(tmp_path):
    run = made(tmp_path / "run", clients=("north", "south"), sites=["north", "south", "west"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for m in lines[1:]:
        m |= {"site_north_reported": 1.0, "site_north_bytes_sent": 2e6, "site_north_seconds": 0.5}
        del m["validation_by_client"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    (run / "report.json").unlink()
    heads, words, text = read(fedtorch.report(run))
    assert "Sites" in heads and "3 of 3" in words and "3 sites, small" in words
    assert ">west</th>" in text, "a site that never came is there"
    assert not {"Clients, round by round", "Who holds what", "What is taken for what"} & {*heads}


def test_a_second_run_is_held_against_it(tmp_path):
    run = made(tmp_path / "run", lr=0.1)
    other = made(
        tmp_path / "other", lr=0.5, clients=("b", "c"), shown={"confusion": [[10, 0], [0, 10]]}
    )
    heads, words, text = read(fedtorch.report(run, tmp_path / "two.html", against=other))
    assert (
        "Against other" in heads and "option that differs" in words and "client, by loss" in words
    )
    assert text.count("line s0 other") == 2 and "test accuracy, other" in words
    assert "The options are the same" in read(fedtorch.report(run, against=run))[1]


def test_the_command_says_where_it_is_and_overwrites_nothing_else(tmp_path, capsys, monkeypatch):
    run = made(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run"]) == main(["report", "run", "--output", "."]) == 0
    assert capsys.readouterr().out == "report: run/report.html (open it in a browser)\n" + (
        "report: report.html (open it in a browser)\n"
    )
    before = (run / "config.toml").read_text()
    for words, said in (
        (["run", "--output", "run/config.toml"], "is there, and no report of a run"),
        (["run", "--output", "no/where.html"], "give --output a file in a folder that is there"),
        (["run", "--against", "nowhere"], "nowhere holds no run"),
        (["nowhere"], "nowhere holds no run"),
        ([], "takes one run folder"),
    ):
        assert main(["report", *words]) == 2
        assert said in capsys.readouterr().err
    assert (run / "config.toml").read_text() == before


ODD = '{"round": 1e999, "clients": {"a": 3}, "confusion": [[1, "x"]]}\n'
FILES = (
    "metrics.jsonl",
    "config.toml",
    "summary.json",
    "report.json",
    "privacy.json",
    "about.json",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "what", ["{", "[1]", ODD, "\x00\xff"], ids=["half", "list", "odd", "bytes"]
)
def test_a_damaged_file_costs_its_section_and_is_said(name, what, tmp_path):
    run = made(tmp_path / "run", privacy="sample", mark="nonprivate_")
    (run / name).write_bytes(what.encode("latin-1"))
    heads, words, _ = read(fedtorch.report(run))
    said = "Damaged or edited" in words or "No round of this run is recorded" in words
    # the half line that a kill leaves is no round; what is read as another table costs what it lacks
    assert said or name in ("privacy.json", "about.json") or what in ("[1]", ODD)
    assert "Versions" in heads or name == "about.json"


def test_a_pipe_in_place_of_a_file_does_not_keep_it_waiting(tmp_path):
    run = made(tmp_path / "run", privacy="sample", mark="nonprivate_")
    for name in ("privacy.json", "report.html"):
        os.mkfifo(run / name)
    with pytest.raises(fedtorch.ConfigError, match="is a pipe, not a file"):
        fedtorch.report(run)
    assert "At most: epsilon 1.5" in read(fedtorch.report(run, tmp_path / "r.html"))[1]


def test_figures_of_any_kind_are_no_error(tmp_path):
    run = made(tmp_path / "run")
    own = {"a": [1], "b": {"loss": None, "accuracy": "x"}}
    odd = {"round": 4, "test_accuracy": "high", "test_loss": float("inf"), "train_loss": 1e300}
    odd |= {"validation_by_client": own, "failed": [["q"]], "cohort": 3}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(odd) + "\n")
    read(fedtorch.report(run, against=run))


def test_a_run_without_rounds_or_of_another_version_has_a_page(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.toml").write_text("rounds = 3\n")
    heads, words, _ = read(fedtorch.report(bare))
    assert "No round of this run is recorded" in words and heads == ["Privacy", "Options"]
    late = made(tmp_path / "late", shown={"format": "fedtorch report 99"})
    heads, words, _ = read(fedtorch.report(late))
    assert "another version wrote it" in words and "What is taken for what" not in heads


def test_many_clients_rounds_and_classes_stay_a_page(tmp_path):
    names = [str(k) for k in range(110)]
    wide = {
        "classes": [str(k) for k in range(60)],
        "confusion": [[k != j and k + j for j in range(60)] for k in range(60)],
    }
    wide["confusion"] = [[int(v) for v in row] for row in wide["confusion"]]
    run = made(tmp_path / "run", rounds=70, clients=names, shown=wide)
    _, words, text = read(fedtorch.report(run))
    assert words.count("10 clients more are not shown") == 3
    assert "of 70 rounds are shown" in words and "is taken for" in words
    assert len(text) < 2_000_000


def test_an_address_loses_its_password(tmp_path):
    run = made(tmp_path / "run", tracking={"name": "mlflow", "uri": "http://me:secret@host/x"})
    _, words, text = read(fedtorch.report(run, against=run))
    assert "http://...@host/x" in words and "secret" not in text


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here to open the page in")
def test_a_browser_opens_it_without_a_complaint(tmp_path):
    path = fedtorch.report(made(tmp_path / "run"))
    shot = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'home'}",
    ]
    out = subprocess.run(
        [*shot, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0 and out.stdout.count("<svg") == 2
    assert "Refused" not in out.stderr and "CONSOLE" not in out.stderr
