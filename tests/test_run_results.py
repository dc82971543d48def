"""Run folders as a table: what a screen shows of them."""

from pathlib import Path

import pytest

from fedtorch.rounds.history import History
from fedtorch.run.console import fitting, show_table
from fedtorch.run.results import Saved, cut, screen_table


def run(name: str, **options: object) -> Saved:
    figures = {"round": 3, "test_loss": 0.5, "test_auroc": 0.75, "seconds_elapsed": 12.345}
    return Saved(Path("runs", name), {"model": "mlp", **options}, History([figures]), {})


def test_a_federation_has_its_sites_for_data_and_others_their_dataset():
    sites, own = screen_table(
        [run("a", sites=["x", "y"], rounds=9), run("b", dataset="csv", privacy="null")]
    )
    assert (sites["data"], sites["state"], sites["auroc"], sites["seconds"]) == (
        "2 sites",
        "3/9",
        0.75,
        12.3,
    )
    assert (own["data"], own["privacy"]) == ("csv", "none")
    assert list(own)[:7] == ["run", "data", "model", "strategy", "privacy", "auroc", "epsilon"]
    assert "test_loss" in own and "dataset" not in own


@pytest.mark.parametrize("width", [80, 200])
def test_long_names_of_runs_are_cut_in_their_middle_to_fit_the_window(width, monkeypatch):
    names = [f"labelled-text-transformer-fedprox-20261129-23292{k}-451" for k in range(2)]
    runs = [run(n, dataset="labelled-text", strategy="scaffold") for n in names]
    assert fitting(screen_table(runs), "run") is None  # no window: a file, a pipe
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    room = fitting(
        [{k: v for k, v in r.items() if k != "test_loss"} for r in screen_table(runs)], "run"
    )
    shown = [r["run"] for r in screen_table(runs, room)]
    assert len({*shown}) == 2 and (shown == names) == (width == 200)
    assert all("…" in n or n in names for n in shown)


def test_a_name_is_cut_in_its_middle():
    assert cut("abcdefghij", 10) == "abcdefghij"
    assert cut("abcdefghij", 7) == "ab…ghij"


@pytest.mark.parametrize(
    "summary, shown, state",
    [
        ({}, {}, "round 3/9"),
        ({"rounds": 3}, {}, "stopped 3/9"),
        ({"rounds": 3}, {"rounds": 3}, "done"),
        ({"rounds": 3, "learned": False}, {"rounds": 3}, "nothing learned"),
        ({"rounds": 2}, {"rounds": 12}, "round 3/12"),
        ({"rounds": 9}, {"rounds": 9}, "done"),
    ],
    ids=["killed", "stopped", "done", "nothing", "resumed", "lines-lost"],
)
def test_the_state_is_of_the_rounds_asked_for_last(summary, shown, state):
    """A resumed run may ask for other rounds than its config, and has the summary of its first end."""
    here = Saved(Path("r"), {"rounds": 9}, History([{"round": 3}]), summary, (), shown)
    assert here.state() == state


def test_a_pipe_keeps_to_the_columns_that_are_asked_for(monkeypatch, capsys):
    rows = [{"run": "x" * 30, "state": "y" * 30}]
    show_table(rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) > 60
    monkeypatch.setenv("COLUMNS", "40")
    show_table(rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40
    assert fitting(rows, "run") is not None
