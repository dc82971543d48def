"""Record: a run made in Python is a run folder like any other, and goes on after a break."""

import json
import tomllib
from dataclasses import replace

import pytest
import torch

from conftest import weights
from fedtorch import BestModel, Checkpoint, ConfigError, Recipe, Record, report, resume
from fedtorch.run import results
from test_run_callbacks import PLAN, TEST, served


def test_a_run_from_python_is_a_run_folder_that_the_commands_read(fedtorch, tmp_path):
    server, best = served(), BestModel()
    history = server.fit(3, TEST, callbacks=[Record("runs/mine"), best], progress=False)
    run = results.load("runs/mine")
    keys = [k for k in history[-1] if "seconds" not in k]
    assert [m["round"] for m in run.history] == [0, 1, 2, 3] and not run.notes
    assert {k: run.history[-1][k] for k in keys} == {k: history[-1][k] for k in keys}
    told = run.options
    assert (told["model"], told["strategy"], told["strategy.server.lr"]) == (
        "Sequential",
        "scaffold",
        0.3,
    )
    # what was restored is what is kept, and judged
    assert run.summary["model_of_round"] == best.round_number < 3
    assert run.summary["test_loss"] == history[best.round_number]["test_loss"]
    kept = run.shown
    assert [n for n, _ in kept["clients"].values()] == [len(c) for c in server.clients]
    assert sum(map(sum, kept["confusion"])) == len(TEST[0]) and kept["rounds"] == 3
    assert "What is taken for what" in report("runs/mine").read_text()
    code, out, _ = fedtorch("runs")
    assert code == 0 and "runs/mine" in out and "done" in out
    code, out, err = fedtorch("eval", "runs/mine", "--json")
    assert code == 0 and json.loads(out)["test_loss"] == run.summary["test_loss"]
    assert "made in Python" in err and f"of round {best.round_number} as it wrote" in err
    assert "c0" in fedtorch("eval", "runs/mine")[1]
    for command in (
        ("predict", "runs/mine", "x.npy"),
        ("train", "--run-dir", "runs/mine", "--resume"),
    ):
        code, out, err = fedtorch(*command)
        assert code == 2 and "was made in Python, where its model" in err and err.count("\n") == 1
    served().fit(1, callbacks=[Record("runs/other", tracking="none")], progress=False)
    assert not list((tmp_path / "runs/other").glob("*tfevents*"))
    code, out, _ = fedtorch("compare", "runs/mine", "runs/other")
    assert code == 0 and "test loss" in out.replace("_", " ")


def test_a_record_goes_on_after_a_break_and_refuses_what_is_not_its_run(tmp_path):
    whole, part, path = served(), served(), tmp_path / "run"
    whole.fit(5, TEST, progress=False)
    part.fit(3, TEST, callbacks=[Record(path, checkpoint_every=2)], progress=False)
    again = served()
    with pytest.raises(
        ConfigError, match=r"already holds a run, which has come to round 3: .*resume"
    ):
        again.fit(1, callbacks=[Record(path)])
    assert resume(again, path)
    again.fit(2, TEST, callbacks=[Record(path)], progress=False)
    assert all(torch.equal(v, weights(again.model)[k]) for k, v in weights(whole.model).items())
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [m["round"] for m in lines] == [0, 1, 2, 3, 4, 5]
    other = served(Recipe(lr=0.1))
    with pytest.raises(
        ConfigError, match=r"run has lr = 1\.5, not 0\.1: make the Server as it was"
    ):
        resume(other, path)
        other.fit(1, callbacks=[Record(path)])
    again.fit(1, TEST, callbacks=[Record(path)], progress=False)  # the same server needs no resume
    with pytest.raises(ConfigError, match="already holds a run"):
        served().fit(1, callbacks=[Checkpoint(path)])


def test_a_private_run_keeps_its_ledger_and_tells_what_it_cost(tmp_path):
    server = served(Recipe(privacy=PLAN))
    server.fit(2, TEST, callbacks=[Record(tmp_path / "p")], progress=False)
    told = json.loads((tmp_path / "p/privacy.json").read_text())
    assert told["epsilon_spent"] == server.private.spent() > 0 and told["rounds_charged"] == 2
    assert (tmp_path / "p/ledger.jsonl").read_bytes().count(b"\n") == 3
    assert (tmp_path / "p/checkpoints/round-000002.pt").stat().st_mode & 0o77 == 0
    again = served(Recipe(privacy=PLAN))
    assert resume(again, tmp_path / "p") and again.private.spent() == server.private.spent()
    strict = served(Recipe(privacy=replace(PLAN, strict=True)))
    strict.fit(1, TEST, callbacks=[Record(tmp_path / "s")], progress=False)
    kept = json.loads((tmp_path / "s/metrics.jsonl").read_text().splitlines()[-1])
    assert "test_loss" in kept and not any("validation" in k or "seconds" in k for k in kept)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"folder": 5}, "folder of Record must be"),
        ({"tracking": "tensorbord"}, "unknown tracking 'tensorbord'"),
        ({"tracking": 5}, "tracking of Record must be"),
        ({"checkpoint_every": 0}, "Record.checkpoint_every must be"),
        ({"data": TEST}, "data of Record must be"),
        ({"folder": "file"}, "file cannot be written"),
    ],
    ids=["folder", "tracker", "no-tracker", "every", "data", "file"],
)
def test_a_record_that_cannot_be_is_refused_before_training(options, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    server = served()
    with pytest.raises(ConfigError, match=why):
        server.fit(1, callbacks=[Record(**{"folder": "run"} | options)])
    assert server.round_number == 0


def test_a_run_of_the_command_is_not_gone_on_with_here(fedtorch, tmp_path):
    small = ("--clients", "2", "--rounds", "1", "--privacy", "none", "--model", "logistic")
    assert fedtorch("train", *small, "--run-dir", "run", "--tracking", "none")[0] == 0
    with pytest.raises(ConfigError, match="fedtorch train --run-dir run --resume"):
        served().fit(1, callbacks=[Record("run")])
    assert tomllib.loads((tmp_path / "run/config.toml").read_text())["rounds"] == 1


@pytest.mark.parametrize("first", [0, 1])
def test_one_folder_is_kept_by_one_callback(tmp_path, first):
    both = [Record(tmp_path / "run"), Checkpoint(tmp_path / "run")]
    with pytest.raises(
        ConfigError, match=r"folder of \w+ and of \w+: leave one out \(Record saves"
    ):
        served().fit(1, callbacks=[both[first], both[1 - first]], progress=False)
