"""Commands on real run folders: tables, comparison, evaluation, prediction, completion, sweeps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fedtorch.__main__ import main
from fedtorch.commands.listing import script
from fedtorch.data import Csv, Digits
from fedtorch.rounds.history import History
from fedtorch.run.sweep import arguments, settings
from fedtorch.types import ConfigError

SMALL = ["--privacy", "none", "--model", "logistic", "--epochs", "1", "--clients", "3"]
SMALL += ["--tracking.pictures", "false"]  # drawn in test_tracking

QUICK = [
    "--privacy",
    "none",
    "--epochs",
    "1",
    "--clients",
    "3",
    "--tracking",
    "none",
    "--rounds",
    "1",
]

OWN = """from torch import nn
def build(in_features, num_outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, num_outputs))
"""
"""A model file of the user's own."""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    words = ["train", *SMALL, "--rounds", "2", "--validation", "0.2", "--run-dir", str(folder)]
    assert main([*words, "--sweep", "lr=0.05,0.5", "strategy=fedavg,fedprox"]) == 0
    return folder


A, B = "lr=0.05,strategy=fedavg", "lr=0.5,strategy=fedprox"


def output(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_a_sweep_leaves_a_run_for_each_combination(swept, capsys):
    table = json.loads(output(capsys, "runs", str(swept), "--json"))
    assert {(r["lr"], r["strategy"]) for r in table} == {
        (lr, s) for lr in (0.05, 0.5) for s in ("fedavg", "fedprox")
    }
    assert all(r["state"] == "done" and 0 < r["test_accuracy"] <= 1 for r in table)
    assert all(r["seconds"] > 0 and r["epsilon"] is None for r in table)
    shown = output(capsys, "runs", str(swept))
    assert shown.count("\n") == 5 and " accuracy " in shown and "\x1b" not in shown
    columns = ["run", "data", "model", "strategy", "privacy", "accuracy", "epsilon", "seconds"]
    assert shown.split()[: len(columns) + 1] == [*columns, "state"]


def test_runs_are_sorted_and_chosen_by_columns_options_and_figures(swept, capsys):
    def names(*words: str) -> list[str]:
        rows = json.loads(output(capsys, "runs", str(swept), "--json", *words))
        return [Path(r["run"]).name for r in rows]

    table = {r["run"]: r for r in json.loads(output(capsys, "runs", str(swept), "--json"))}
    best = sorted(table, key=lambda n: -table[n]["test_accuracy"])
    assert [table[n]["test_accuracy"] for n in names("--sort", "accuracy")] == [
        table[n]["test_accuracy"] for n in best
    ]
    low = [table[n]["test_loss"] for n in names("--sort", "test-loss")]
    assert low == sorted(low)
    assert len(names("--where", "strategy=FedProx")) == 2
    assert names("--where", "strategy=fedprox,lr<0.1") == ["lr=0.05,strategy=fedprox"]
    assert (
        names("--where", "accuracy>2") == names("--where", "strategy!=fedprox,privacy=sample") == []
    )
    assert "none of 4 runs is so" in output(capsys, "runs", str(swept), "--where", "accuracy>2")
    for words, said in (
        (["--where", "stratgy=x"], "no run has 'stratgy'; did you mean strategy"),
        (["--where", "strategy"], "--where takes option=value"),
        (["--sort", "xyzzy"], "no run has 'xyzzy'; see fedtorch runs --json"),
    ):
        assert main(["runs", str(swept), *words]) == 2
        assert said in capsys.readouterr().err


def test_a_sweep_compares_by_what_it_varies(swept):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    content = EventAccumulator(str(swept / A)).Reload().PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert [h.name for h in experiment.hparam_infos] == ["lr", "strategy"]


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path, capsys):
    words = ["train", *SMALL, f"--run-dir={tmp_path}", "--sweep", "lr=0.1,0.2"]
    assert main([*words, "--rounds", "1"]) == 0
    assert main([*words, "--rounds", "2"]) == 0
    assert capsys.readouterr().out.count("resumed after round 1") == 2
    assert len(History.load(tmp_path / "lr=0.2")) == 3


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "at least one option=value"),
        (["lr"], "takes option=value,value"),
        (["lr=0.1,"], "takes option=value,value"),
        (["lr=0.1,0.1"], "twice"),
        (["lr=0.1", "lr=0.2"], "twice"),
        (["run_dir=a,b"], "cannot vary run_dir"),
    ],
)
def test_sweeps_that_cannot_be_meant(words, message):
    with pytest.raises(ConfigError, match=message):
        settings(["--sweep", *words])


def test_every_run_of_a_sweep_is_checked_before_the_first_trains(tmp_path, capsys):
    words = ["train", *SMALL, "--run-dir", str(tmp_path), "--sweep", "strategy=fedavg,fedavgg"]
    assert main(words) == 2
    assert "unknown strategy 'fedavgg'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    for swept, why in (
        ("model=logistic,logistc", "run model=logistc: unknown model 'logistc'"),
        ("strategy=fedavg,fednova", "run strategy=fednova: strategy fednova sends numbers that no"),
        ("monitor=test_loss,test_f1", "run monitor=test_f1: "),
        ("model=a/b.py,a_b.py", "has values that would share a folder"),
    ):
        more = ["--privacy", "sample", "--sweep", swept, "--keep", "best"]
        assert main(["train", *SMALL, "--run-dir", str(tmp_path), *more]) == 2
        assert why in (said := capsys.readouterr().err) and "--sweep" in said
        assert list(tmp_path.iterdir()) == []


def test_sweep_names_are_folders():
    (setting,) = settings(["--sweep", "model=models/mlp.py"])[1]
    assert "model=models_mlp.py" in arguments([], setting, Path("x"))[-1]


def test_compare_shows_what_differs(swept, tmp_path, capsys):
    png = tmp_path / "c.png"
    a, b = str(swept / A), str(swept / B)
    shown = output(capsys, "compare", a, b, "--png", str(png))
    assert "lr" in shown and "fedprox" in shown and "seed" not in shown
    assert "test accuracy" in shown and shown.rstrip().endswith("round")
    with Image.open(png) as image:
        assert image.size[0] > 400
    table = json.loads(output(capsys, "compare", a, b, "--json"))
    assert table["options"]["lr"] == [0.05, 0.5] and table["options"]["strategy.mu"][0] is None
    assert table["results"]["state"] == ["done", "done"]
    last = [History.load(swept / n)[-1]["validation_by_client"] for n in (A, B)]
    assert table["clients"]["accuracy"]["2"] == [own["2"]["accuracy"] for own in last]
    apart = [abs(b - a) for a, b in table["clients"]["loss"].values()]
    assert apart == sorted(apart, reverse=True) and len(apart) == 3
    assert list(table["classes"]) == [str(k) for k in range(10)]
    assert "clients by loss" in shown and "share right by class" in shown and "B - A" in shown
    assert "the options are the same" in output(capsys, "compare", a, a)


def test_eval_gives_the_figures_the_run_ended_with(swept, capsys):
    figures = json.loads(output(capsys, "eval", str(swept / A), "--json"))
    last = History.load(swept / A)[-1]
    each, taken = figures.pop("validation_by_client"), figures.pop("confusion")
    assert figures == pytest.approx({k: last[k] for k in figures}, rel=1e-6)
    for client, scores in last["validation_by_client"].items():
        assert each[client] == pytest.approx(scores, rel=1e-6)
    assert {"test_loss", "test_accuracy", "validation_accuracy_min"} <= figures.keys()
    counts = taken["counts"]
    right = sum(counts[k][k] for k in range(10)) / sum(map(sum, counts))
    assert right == pytest.approx(last["test_accuracy"]) and taken["classes"][0] == "0"
    kept = json.loads((swept / A / "report.json").read_text())
    assert kept["confusion"] == counts and sum(n for n, _ in kept["clients"].values()) > 1000
    shown = output(capsys, "eval", str(swept / A))
    assert "test accuracy" in shown and "a column for what it is taken for" in shown


def test_eval_of_a_personal_run_gives_each_client_what_it_keeps(tmp_path, capsys):
    folder = str(tmp_path / "run")
    words = ["--strategy", "fedper", "--strategy.personal", "1.bias", "--validation", "0.3"]
    assert main(["train", *SMALL, *words, "--rounds", "2", "--run-dir", folder]) == 0
    figures = json.loads(output(capsys, "eval", folder, "--json"))
    last = History.load(Path(folder))[-1]
    assert figures["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert figures["validation_loss_max"] > figures["validation_loss_min"]


@pytest.mark.parametrize("width", [70, 400])
def test_a_narrow_window_has_the_results_and_says_what_it_leaves_out(
    swept, width, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = output(capsys, "runs", str(swept))
    assert shown.count("done") == 4
    assert ("more options differ: widen the window" in shown) == (width == 70)
    assert ("strategy.mu" in shown) == (width == 400)


def test_predict_takes_arrays_and_pictures(swept, tmp_path, capsys):
    x, y = Digits().load(0).test.tensors
    np.save(tmp_path / "x.npy", x.numpy())
    np.savez(tmp_path / "x.npz", x=x.numpy())
    run = str(swept / B)
    labels = [int(w) for w in output(capsys, "predict", run, str(tmp_path / "x.npy")).split()]
    right = sum(a == b for a, b in zip(labels, y.tolist(), strict=True)) / len(y)
    assert right == pytest.approx(History.load(run)[-1]["test_accuracy"], abs=1e-6)
    rows = output(capsys, "predict", run, str(tmp_path / "x.npz"), "--json").splitlines()
    assert json.loads(rows[0])["prediction"] == labels[0]
    assert 0 < json.loads(rows[0])["probability"] <= 1
    picture = Image.fromarray((x[0, 0].numpy() * 255).astype("uint8"))
    picture.save(tmp_path / "x.png")
    assert int(output(capsys, "predict", run, str(tmp_path / "x.png"))) == labels[0]
    picture.resize((12, 9)).save(tmp_path / "wide.png")
    assert main(["predict", run, str(tmp_path / "wide.png")]) == 0
    assert "has 9 x 12 pixels and is stretched to the 8 x 8 of" in capsys.readouterr().err


def test_predict_reads_tables_as_the_training_did(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=g) * torch.tensor([1.0, 100.0])
    lines = [f"{a:.4f},{b:.4f},{int(a > 0)}" for a, b in x.tolist()]
    Path("t.csv").write_text("\n".join(["a,b,y", *lines]) + "\n")
    data = ["--dataset", "csv", "--dataset.path", "t.csv", "--dataset.standardize", "true"]
    assert main(["train", *SMALL, *data, "--rounds", "2", "--run-dir", "run"]) == 0
    Path("new.csv").write_text("b,a\n5,3\n5,-3\n")
    assert output(capsys, "predict", "run", "new.csv").split() == ["1", "0"]
    train = Csv("t.csv", standardize=True).load(0).train.tensors[0]
    assert train.mean(0).abs().max() < 1e-5
    Path("bad.csv").write_text("a,c\n1,2\n")
    assert main(["predict", "run", "bad.csv"]) == 2
    assert "no column 'b'" in capsys.readouterr().err


def test_predict_writes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("abcabcabc" * 60)
    text = ["--dataset", "text", "--dataset.path", "t.txt", "--dataset.length", "12"]
    small = ["--privacy", "none", "--clients", "2", "--partition", "iid", "--lr", "1"]
    more = ["--model", "lstm", "--rounds", "8", "--run-dir", "run"]
    assert main(["train", *small, *text, *more]) == 0
    Path("start.txt").write_text("abc")
    added = output(capsys, "predict", "run", "start.txt", "--length", "6")
    assert len(added) == 7 and set(added.strip()) <= set("abc")
    Path("start.txt").write_text("xyz")
    assert main(["predict", "run", "start.txt"]) == 2
    assert "never saw" in capsys.readouterr().err


def test_a_run_of_somebody_elses_runs_nothing(tmp_path, state, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    words = ["train", *QUICK, "--model", "mine.py", "--run-dir", "run"]
    assert main(words) == 0
    shutil.rmtree(state)  # as on a machine where somebody else's run arrives
    Path("mine.py").write_text(OWN + "from pathlib import Path\nPath('traces').touch()\n")
    np.save("x.npy", np.zeros((2, 1, 8, 8)))
    table = ["--run-dir", "run", "--rounds", "2"]
    uses = [["eval", "run"], ["predict", "run", "x.npy"], ["train", *table, "--resume"]]
    again = ["train", "--config", "run/config.toml", "--run-dir", "other"]
    for use in (*uses, again, [*again, "--sweep", "seed=1,2"]):
        assert main(use) == 2
        assert "model = 'mine.py'; add --trust-code" in capsys.readouterr().err
    assert main(["runs", "run"]) == main(["compare", "run", "run"]) == 0
    assert not Path("traces").exists()
    for use in uses:
        assert main([*use, "--trust-code"]) == 0
    assert Path("traces").exists()


def test_a_run_of_ones_own_needs_no_flag_in_its_folder_and_unchanged(tmp_path, capsys, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    Path("mine.py").write_text(OWN)
    words = ["train", *QUICK, "--model", "mine.py", "--run-dir", "run"]
    assert main(words) == 0
    resume = ["train", "--run-dir", "run", "--resume", "--rounds", "2"]
    assert main(["eval", "run"]) == main(resume) == 0
    shutil.copytree(home, elsewhere, dirs_exist_ok=True)
    monkeypatch.chdir(elsewhere)  # where mine.py may be another's
    assert main(["eval", "run"]) == main(resume) == 2
    monkeypatch.chdir(home)
    config = Path("run/config.toml")
    config.write_text(config.read_text().replace('"mine.py"', '"other.py"'))
    Path("mine.py").rename("other.py")
    assert main(["eval", "run"]) == 2
    assert "other.py'; add --trust-code" in capsys.readouterr().err


def test_only_what_a_command_imports_needs_the_flag(tmp_path, state, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_score.py").write_text("def hits(o, y):\n    return (o.argmax(1) == y).float()\n")
    words = ["train", *QUICK, "--metrics", "own_score:hits", "--run-dir", "run"]
    assert main(words) == 0
    shutil.rmtree(state)
    np.save("x.npy", np.zeros((2, 1, 8, 8)))
    assert main(["predict", "run", "x.npy"]) == 0, "a prediction asks no metric"
    assert main(["eval", "run"]) == 2
    assert "metrics = 'own_score:hits'; add --trust-code" in capsys.readouterr().err


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    """A folder of somebody else: a run of a model of fedtorch's, and a file of its name beside it."""
    place = tmp_path_factory.mktemp("brought")
    assert main(["train", *QUICK, "--model", "small", "--run-dir", str(place / "run")]) == 0
    (place / "models").mkdir()
    (place / "models" / "small.py").write_text("from pathlib import Path\nPath('traces').touch()\n")
    return place


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("where", ["inside", "beside", "linked", "sibling"])
def test_models_that_came_with_a_run_are_not_run(
    brought, where, named, tmp_path, capsys, monkeypatch
):
    shutil.copytree(brought, tmp_path, dirs_exist_ok=True)
    run, cwd = tmp_path / "run", {"beside": tmp_path, "sibling": tmp_path / "work"}.get(where)
    if where == "linked":
        (run / "models").symlink_to("../models")
    elif where != "beside":
        shutil.move(tmp_path / "models", (cwd or run) / "models")
    if not named:  # what a config leaves out is looked up by the same name
        config = (run / "config.toml").read_text()
        (run / "config.toml").write_text(config.replace('model = "small"\n', ""))
    monkeypatch.chdir(cwd or run)
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8)))
    uses = [["eval", str(run)], ["predict", str(run), "../x.npy"]]
    uses += [["train", "--config", str(run / "config.toml"), "--run-dir", str(tmp_path / "other")]]
    uses += [["train", "--run-dir", str(run), "--resume", "--rounds", "2"]] if named else []
    for use in uses:
        assert main(use) == 2
        assert "model = 'models/small.py'; add --trust-code" in capsys.readouterr().err
    assert not list(tmp_path.rglob("traces"))


def test_models_of_ones_own_need_no_flag_for_runs_begun_here(tmp_path, state, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/mine.py").write_text(OWN)
    assert main(["train", *QUICK, "--model", "mine", "--run-dir", "run"]) == 0
    assert main(["eval", "run"]) == 0
    assert main(["train", "--run-dir", "run", "--resume", "--rounds", "2"]) == 0
    again = ["train", "--config", "run/config.toml", "--run-dir"]
    assert main([*again, "again"]) == 2
    assert main([*again, "again", "--model", "mine"]) == 0, "what is typed is trusted"
    shutil.rmtree(state)
    assert main(["eval", "run"]) == 2
    assert "model = 'models/mine.py'" in capsys.readouterr().err
    assert main(["eval", "run", "--trust-code"]) == 0


def test_a_file_here_is_never_taken_for_a_package(brought, tmp_path, capsys, monkeypatch):
    shutil.copytree(brought / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p).is_absolute()])
    Path("wandb.py").write_text("from pathlib import Path\nPath('traces').touch()\n")
    resume = ["train", "--run-dir", "run", "--resume", "--rounds", "2", "--tracking"]
    assert main([*resume, "wandb"]) == 2
    assert "needs the package wandb" in capsys.readouterr().err
    Path("own_tracking.py").write_text("")
    assert main([*resume, "own_tracking.Mine"]) == 2
    assert "module 'own_tracking' has no attribute 'Mine'" in capsys.readouterr().err
    assert not Path("traces").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["runs", "nowhere"], "there are no runs in nowhere"),
        (["compare", "one"], "takes two run folders"),
        (["compare", "one", "two"], "one holds no run"),
        (["eval"], "takes one run folder"),
        (["predict", "one"], "takes a run folder and a file"),
        (["completion", "fish"], "takes bash or zsh"),
    ],
)
def test_bad_input_is_one_sentence(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_what_was_likely_meant_is_named(swept, capsys):
    file = str(swept / A / "about.json")
    for argv, message in (
        (
            ["eval", str(swept)],
            "holds no run (there is no config.toml in it); name one of those in it",
        ),
        (["predict", file, str(swept / A)], "is a file, and holds no run"),
        (["predict", str(swept / A), file, "--length", "9"], "--length is for models of texts"),
        (["runs", str(swept), "--where", "accuracy>much"], "--where compares numbers by >"),
        (
            ["serve", "--resume", "--run-dir", str(swept / A)],
            "is one of fedtorch train: fedtorch train",
        ),
    ):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["x.npy", "x.png", "x.doc", "wrong.npy", "text.npy"])
def test_files_that_cannot_be_predicted(name, swept, tmp_path, capsys):
    np.save(tmp_path / "wrong.npy", np.zeros((2, 5)))
    (tmp_path / "text.npy").write_text("text")
    assert main(["predict", str(swept / A), str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert name in err and "Errno" not in err and "pickle" not in err


def test_a_run_that_has_not_ended_has_no_model(tmp_path, capsys):
    assert main(["train", *SMALL, "--rounds", "1", "--run-dir", str(tmp_path / "run")]) == 0
    (tmp_path / "run/model.safetensors").unlink()
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "holds no trained model yet" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flip", "cut", "stripped"])
def test_a_damaged_model_is_never_used(how, swept, tmp_path, capsys):
    shutil.copytree(swept / A, tmp_path / "run")
    path = tmp_path / "run/model.safetensors"
    raw = path.read_bytes()
    if how == "flip":  # one bit of one weight
        path.write_bytes(raw[:-7] + bytes([raw[-7] ^ 1]) + raw[-6:])
    elif how == "cut":
        path.write_bytes(raw[:-10])
    else:
        save_file(load_file(path), path)
    assert main(["eval", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "model.safetensors" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.toml"])
def test_a_file_that_is_not_what_the_run_wrote_is_said(name, swept, tmp_path, capsys):
    shutil.copytree(swept / A, tmp_path / "runs/one")
    shutil.copytree(swept / B, tmp_path / "runs/two")
    path = tmp_path / "runs/one" / name
    path.write_text(path.read_text().replace("0.", "1.", 1))
    assert main(["runs", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr()
    assert f"one/{name} is not what the run wrote: damaged or edited" in shown.err
    assert "two" in shown.out
    for command in (["eval"], ["compare", str(tmp_path / "runs/two")]):
        main([*command, str(tmp_path / "runs/one")])
        assert name in capsys.readouterr().err


def complete(words: str) -> list[str]:
    count = len(words.split()) - (0 if not words.endswith(" ") else -1) - 1
    ask = f"{script()}\nCOMP_WORDS=({words})\nCOMP_CWORD={count}\n_fedtorch\necho ${{COMPREPLY[@]}}"
    run = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_bash_completes_commands_options_and_choices():
    assert complete("fedtorch com") == ["compare", "completion"]
    assert complete("fedtorch train --batch") == ["--batch-size"]
    assert complete("fedtorch train --strategy fedpr") == ["fedprox"]
    assert complete("fedtorch runs so") == []


def test_history_as_a_table(swept):
    history = History.load(swept / A)
    frame = history.to_pandas()
    assert list(frame.index) == [0, 1, 2]
    assert frame.loc[2, "test_accuracy"] == history[-1]["test_accuracy"]
    assert repr(history).startswith("History(2 rounds: train_loss ")
    assert history._repr_html_().count("<tr>") == 4
    assert repr(History()) == "History(0 rounds)"


def test_pandas_is_asked_for_when_it_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        History([{"round": 1}]).to_pandas()


def test_long_swept_names_still_are_folders_of_their_own():
    (one,), (two,) = (settings(["--sweep", f"dataset.path={'d' * 300}{k}"])[1] for k in (1, 2))
    names = [Path(arguments([], setting, Path("x"))[-1]).name for setting in (one, two)]
    assert names[0] != names[1] and all(len(n) < 256 for n in names)


@pytest.mark.parametrize("command", [("predict", "run", "x.npz"), ("audit", "run")])
def test_a_federations_run_is_not_taken_for_one_of_train(fedtorch, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text('sites = ["a", "b"]\nmodel = "mlp"\nrounds = 2\n')
    code, _, said = fedtorch(*command)
    assert code == 2 and "is a federation's" in said and "no option" not in said
