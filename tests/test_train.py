"""The command from the outside: a run that works, and one sentence for each that cannot."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedtorch import disk
from fedtorch.data import Digits
from fedtorch.run import zoo
from fedtorch.run.versions import installed

BASE = ["train", "--privacy", "none", "--model", "mlp", "--rounds", "2"]
SMALL = [*BASE, "--tracking.pictures", "false", "--run-dir", "run"]
SILENT = [*BASE, "--tracking", "none", "--run-dir", "run"]
FACTS = Digits().load(0).facts


def test_a_run_leaves_all_it_should(fedtorch):
    code, out, err = fedtorch(*SMALL, "--seed", 3, "--validation", 0.1, "--schedule", "cosine")
    assert (code, err) == (0, "")
    folder = Path("run")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary | {"test_accuracy": 0, "test_loss": 0, "seconds": 0} == {
        "test_accuracy": 0,
        "test_loss": 0,
        "rounds": 2,
        "ended": "all 2 rounds are trained",
        "clients": 10,
        "seconds": 0,
        "epsilon": None,
        "delta": None,
        "seed": 3,
        "learned": True,
    }
    assert 0 < summary["test_accuracy"] <= 1
    assert "10 clients, 1438 examples" in out
    assert "round    2/2" in out
    assert f"test accuracy {summary['test_accuracy']:.4f}" in out
    assert "tensorboard --logdir" in out
    # the model loads without fedtorch
    model = zoo.build("mlp", FACTS, {})
    model.load_state_dict(load_file(folder / "model.safetensors"))
    about = json.loads((folder / "about.json").read_text())
    assert about["packages"]["torch"] == torch.__version__
    assert about["packages"].get("numba") == installed("numba")
    assert tomllib.loads((folder / "config.toml").read_text())["schedule"]["name"] == "cosine"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert {"validation_accuracy", "validation_accuracy_min"} <= lines[1].keys()
    assert list(folder.glob("events.out.tfevents.*"))


def test_the_saved_config_repeats_the_run(fedtorch):
    odd = ["--strategy", "scaffold", "--strategy.server", "adam", "--batch-size", "null"]
    assert fedtorch(*SMALL, *odd, "--model.hidden", 20)[0] == 0
    again = fedtorch("train", "--config", "run/config.toml", "--run-dir", "again")
    assert again[0] == 0
    a, b = (load_file(f"{f}/model.safetensors") for f in ("run", "again"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    first, second = (tomllib.loads(Path(f"{f}/config.toml").read_text()) for f in ("run", "again"))
    assert first == second
    assert first["batch_size"] == "null"


def test_the_same_seed_is_bit_identical_in_another_process(fedtorch):
    command = [sys.executable, "-m", "fedtorch", *SMALL[:-1], "other", "--strategy", "scaffold"]
    other = "12345" if os.environ.get("PYTHONHASHSEED") != "12345" else "0"
    env = {"PYTHONHASHSEED": other, "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert fedtorch(*SMALL, "--strategy", "scaffold")[0] == 0
    one, two = (Path(f"{f}/model.safetensors").read_bytes() for f in ("other", "run"))
    assert one == two


def test_help_lists_every_contracted_flag(fedtorch):
    code, out, _ = fedtorch("train", "--help")
    assert code == 0
    flags = "dataset model strategy clients rounds lr seed privacy engine run-dir resume config"
    for flag in flags.split(" "):
        assert f"--{flag}" in out
    assert "--strategy.mu" in out


CSV = "a,b,label\n" + "".join(f"{i},{i * 2},{i % 2}\n" for i in range(20))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "cnnn"], "unknown model 'cnnn'; there are bag, cnn, logistic, lstm, mlp"),
        (["--dataset", "digit"], "unknown dataset 'digit'; there are digits, idx"),
        (
            ["--strategy", "fedagv"],
            "unknown strategy 'fedagv'; there are fedavg, fedprox, scaffold",
        ),
        (["--strategy", "no.such.Class"], "cannot import 'no.such.Class'"),
        (
            ["--strategy", "subprocess.Popen"],
            "'subprocess.Popen' is no strategy: it must be a subcl",
        ),
        (["--model", "subprocess:Popen"], "is a class, but no subclass of nn.Module"),
        (["--model", "../models/mlp"], "is neither a name nor path/file.py:Name"),
        (["--loss", "subprocess:Popen"], "is no loss: it must be a function or a subclass"),
        (["--metrics", "subprocess:Popen"], "is no metric: it must be a function or a subclass"),
        (["--optimizer", "subprocess.Popen"], "is no optimizer: it must subclass"),
        (
            ["--dataset", "custom", "--dataset.path", "subprocess:Popen"],
            "must name a function that returns the data",
        ),
        (["--strategy.server", "adamm"], "unknown --strategy.server 'adamm'; there are sgd, adam"),
        (["--partition", "dirichelet"], "unknown partition 'dirichelet'; there are iid"),
        (["--engine", "cloud"], "unknown engine 'cloud'; there are local"),
        (["--clients", "1439"], "1439 clients are more than the 1438 training examples"),
        (["--clients", "0"], "clients must be at least 1"),
        (["--clients", "ten"], "clients: expected int or null, got ten"),
        (["--checkpoint-every", "a"], "--checkpoint-every: expected int or auto, got a"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--rounds", "2.5"], "rounds: "),
        (["--lr", "0"], "lr must be a positive number, got 0"),
        (["--lr", "-1"], "lr must be a positive number, got -1"),
        (["--lr", "nan"], "lr: expected float or null, got nan"),
        (["--config", "nan.toml"], "lr must be a positive number, got nan"),
        (["--lr", "fast"], "lr: expected float or null, got fast"),
        (["--lr"], "--lr needs a value"),
        (["--strategy", "fedprox", "--strategy.mu", "-1"], "strategy.mu must be a number >= 0"),
        (["--strategy.mu", "1"], "fedavg has no option 'mu'; it has server, weighting"),
        (["--model.num_outputs", "5"], "it needs an output of 10 for each example"),
        (["--model.hiden", "5"], "model 'mlp' has no argument 'hiden'; it takes in_features"),
        (["--model", "lstm"], "model 'lstm' needs vocab_size; give it as --model.vocab_size VALUE"),
        (["--model", "nowhere.py:Net"], "there is no model file 'nowhere.py'"),
        (["--loss", "crossentropy"], "unknown loss 'crossentropy'; there are cross_entropy, bce"),
        (["--loss", "mse"], "this loss needs one output for each target"),
        (["--metrics", "accurcy"], "unknown metric 'accurcy'; there are accuracy"),
        (["--metrics", "mae"], "this loss needs one output for each target"),
        (["--optimizer", "sdg"], "unknown client optimizer 'sdg'; there are"),
        (
            ["--optimizer.momentun", "0.9"],
            "client optimizer sgd has no option 'momentun'; it has momentum",
        ),
        (
            ["--participation", "uniform", "--participation.cohort-size", "11"],
            "between 1 and the 10",
        ),
        (["--validation", "1"], "validation must be in [0, 1)"),
        (
            ["--learning-speed", "1"],
            "unknown option --learning-speed; --help lists them",
        ),
        (["--config", "nowhere.toml"], "config file 'nowhere.toml' cannot be read"),
        (["--config", "bad.toml"], "config file 'bad.toml' is not TOML"),
        (["--config", "key.toml"], "the config has no option 'learning_rate'; it has lr, epochs"),
        (["--config", "nested.toml"], "strategy fedprox has no option 'muu'; it has"),
        (["--resume", "--run-dir", "nowhere"], "nothing to resume: nowhere holds no run"),
        (["--resume", "--run-dir", "empty"], "nothing to resume: empty holds no run"),
        (["--run-dir", "t.csv/run"], "run folder t.csv/run cannot be written"),
        (["--dataset", "csv"], "dataset.path must be a CSV file"),
        (["--dataset", "csv", "--dataset.path", "gap.csv"], "gap.csv, line 3: 2 values"),
        (["--dataset", "csv", "--dataset.path", "word.csv"], "line 2: column 'b' holds 'high'"),
        (
            ["--dataset", "csv", "--dataset.path", "t.csv", "--dataset.target", "y"],
            "no target column",
        ),
        (["--dataset", "idx", "--dataset.path", "cut"], "it may be cut short"),
        (["--dataset", "npz", "--dataset.path", "cut.npz"], "cannot be read as an NPZ file"),
        (["extra"], "unexpected argument 'extra': options start with --"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_exit_2_and_nothing_half_written(
    fedtorch, flags, message
):
    here = Path()
    (here / "bad.toml").write_text("rounds = ")
    (here / "key.toml").write_text("learning_rate = 0.1")
    (here / "nan.toml").write_text("lr = nan")
    (here / "nested.toml").write_text('[strategy]\nname = "fedprox"\nmuu = 1.0')
    (here / "t.csv").write_text(CSV)
    (here / "gap.csv").write_text("a,b,label\n1,2,0\n3,4\n")
    (here / "word.csv").write_text("a,b,label\n1,high,0\n3,4,1\n")
    (here / "empty").mkdir()
    (here / "cut").mkdir()
    raw = gzip.compress(np.random.default_rng(0).bytes(500))
    for kind in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
        (here / "cut" / f"train-{kind}").write_bytes(raw[:100])
    np.savez(here / "whole.npz", x=np.zeros((50, 2)), y=np.zeros(50))
    (here / "cut.npz").write_bytes((here / "whole.npz").read_bytes()[:300])
    before = sorted(here.rglob("*"))
    code, out, err = fedtorch(*SMALL, *flags)
    assert message in err
    assert code == 2
    assert err.startswith("fedtorch: ")
    assert err.count("\n") == 1, "one line"
    assert "Traceback" not in out + err
    assert sorted(here.rglob("*")) == before


def test_a_folder_that_holds_a_run_is_not_overwritten(fedtorch):
    assert fedtorch(*SMALL)[0] == 0
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    code, _, err = fedtorch(*SMALL)
    assert code == 2
    assert "already holds a run" in err
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_a_client_that_becomes_nan_is_named_and_the_run_goes_on(fedtorch):
    rows = "".join(f"{i},{i % 7},w{i % 3},{i % 2}\n" for i in range(60))
    # finite in the file, infinite in the first product
    big = "1e38,1e38,bad,0\n1e38,1e38,bad,1\n" * 10
    Path("t.csv").write_text("a,b,ward,label\n" + rows + big)
    data = ["--dataset", "csv", "--dataset.path", "t.csv", "--dataset.client", "ward"]
    code, out, _ = fedtorch(*SMALL, *data)
    assert code == 0
    assert "client bad left out, its update is not finite" in out
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(line["failed"] == {"bad": "nonfinite"} for line in lines[1:])
    assert all(v.isfinite().all() for v in load_file("run/model.safetensors").values())


def test_own_loss_metric_strategy_and_data_come_from_the_working_folder(fedtorch):
    Path("ward.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from fedtorch import FedAvg\n"
        "def loss(output, target):\n"
        "    return torch.nn.functional.cross_entropy(output, target, label_smoothing=0.1)\n"
        "def error(output, target):\n"
        "    return 1 - float((output.argmax(1) == target).float().mean())\n"
        "@dataclass(frozen=True)\n"
        "class Mine(FedAvg):\n"
        "    strength: float = 0.5\n"
    )
    code, out, err = fedtorch(
        *SMALL, "--loss", "ward:loss", "--metrics", "ward:error,accuracy", "--strategy", "ward.Mine",
        "--strategy.strength", 0.25,
    )  # fmt: skip
    sys.modules.pop("ward", None)
    assert (code, err) == (0, "")
    assert "strength 0.25" in out
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_error"] == pytest.approx(1 - last["test_accuracy"])


def test_nothing_that_is_reported_after_training_can_lose_the_model(fedtorch, monkeypatch):
    def fail(*_: object) -> None:
        raise LookupError("no metadata")

    # what privacy.json, the trackers and the last lines are made of
    for name in ("statement", "text", "cost"):
        monkeypatch.setattr(f"fedtorch.run.messages.{name}", fail)
    private = [w if w != "none" else "sample" for w in SMALL]
    code, out, err = fedtorch(*private)
    assert (code, err) == (0, "")
    assert all(v.isfinite().all() for v in load_file("run/model.safetensors").values())
    for what in ("privacy report", "privacy.json", "the report"):
        assert out.count(f"warning: {what} not written (no metadata)") == 1
    assert json.loads(Path("run/summary.json").read_text())["rounds"] == 2


def test_a_model_is_written_before_anything_is_reported(fedtorch, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fedtorch.run.messages.files.write_json",
        lambda path, table: seen.append((path.name, Path("run/model.safetensors").is_file())),
    )
    assert fedtorch(*SILENT)[0] == 0
    assert seen == [("summary.json", True)]


def test_a_reader_that_goes_away_does_not_end_the_run(fedtorch):
    command = [sys.executable, "-m", "fedtorch", *SILENT]
    command += ["--rounds", "12", "--model", "logistic"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    assert (run.stderr.read(), run.wait(60)) == ("", 0)
    run.stderr.close()
    assert json.loads(Path("run/summary.json").read_text())["rounds"] == 12


def test_runs_started_at_the_same_moment_get_folders_of_their_own(fedtorch, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    monkeypatch.setattr(time, "time_ns", lambda: 5_000_000)
    quick = [*BASE, "--model", "logistic", "--rounds", "1", "--tracking", "none"]
    for seed in (1, 2):
        assert fedtorch(*quick, "--seed", seed)[0] == 0
    seeds = {
        p.name: json.loads((p / "summary.json").read_text())["seed"] for p in Path("runs").iterdir()
    }
    name = "digits-logistic-fedavg-20260101-000000-005"
    assert seeds == {name: 1, f"{name}-2": 2}


@pytest.mark.parametrize("folder", ["x" * 300, "a\0b", "/dev/null/x", "/proc/x"])
def test_folders_that_cannot_be_are_one_sentence(fedtorch, folder):
    quick = [*BASE, "--model", "logistic", "--rounds", "1"]
    code, _, err = fedtorch(*quick, "--run-dir", folder)
    assert code == 2 and err.count("\n") == 1 and "cannot be written" in err


def test_a_thread_that_is_not_the_main_one_may_train(fedtorch):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(fedtorch(*SILENT)))
    thread.start()
    thread.join()
    assert [(code, err) for code, _, err in codes] == [(0, "")]


def test_what_an_accelerator_trained_is_used_and_continued_without_one(fedtorch):
    assert fedtorch(*SILENT)[0] == 0
    config = Path("run/config.toml")
    config.write_text(config.read_text().replace('device = "cpu"', 'device = "cuda:77"'))
    np.save("x.npy", np.zeros((2, 1, 8, 8), np.float32))
    assert fedtorch("eval", "run")[0] == 0
    assert fedtorch("predict", "run", "x.npy")[0] == 0
    resume = ("train", "--run-dir", "run", "--resume", "--rounds", "3")
    code, _, err = fedtorch(*resume)
    assert code == 2
    assert "engine.device 'cuda:77' cannot be used here" in err
    assert "engine.device cpu trains anywhere" in err
    code, _, err = fedtorch(*resume, "--engine.device", "cpu")
    assert (code, err) == (0, "")


def test_a_run_that_learned_nothing_says_so_and_keeps_its_model(fedtorch):
    x = np.random.default_rng(0).normal(size=(60, 3)) * 1e4  # never scaled: no step is finite
    np.savez("wide.npz", x=x, y=x.sum(1))
    data = ["--dataset", "npz", "--dataset.path", "wide.npz", "--clients", 3]
    code, out, err = fedtorch(*SMALL, *data)
    assert code == 1 and "no weight has moved in 2 rounds" in err
    assert "nothing learned: 2 rounds" in out and "round 2: no client counted" in out
    assert load_file("run/model.safetensors") and json.loads(Path("run/summary.json").read_text())
    assert "nothing learned" in fedtorch("runs", "run")[1]
    code, _, err = fedtorch("train", "--run-dir", "run", "--resume", "true", "--rounds", 3)
    assert code == 1 and "no weight has moved in 3 rounds" in err


def test_a_run_stops_when_what_is_watched_gets_no_better(fedtorch):
    still = ["--rounds", 9, "--lr", 1e-9, "--stop-after", 2, "--monitor", "test_accuracy"]
    code, out, err = fedtorch(*SILENT, *still)
    assert (code, err) == (0, "")
    assert "ended because test_accuracy was" in out and "not got better in 2 rounds" in out
    assert json.loads(Path("run/summary.json").read_text())["rounds"] == 3
    # it stays so, also in another process
    code, out, _ = fedtorch("train", "--run-dir", "run", "--resume", "--rounds", 12)
    assert code == 0 and "round    4" not in out and "not got better in 2 rounds" in out


def test_the_best_model_is_kept_bit_for_bit_also_by_a_run_that_was_resumed(fedtorch):
    best = [*SILENT[:-2], "--keep", "best", "--monitor", "test_accuracy", "--lr", 3, "--run-dir"]
    code, out, err = fedtorch(*best, "whole", "--rounds", 5)
    assert (code, err) == (0, "")
    assert fedtorch(*best, "broken", "--rounds", 3)[0] == 0
    assert fedtorch("train", "--run-dir", "broken", "--resume", "--rounds", 5)[0] == 0
    one, two = (Path(f"{f}/model.safetensors").read_bytes() for f in ("whole", "broken"))
    assert one == two
    lines = [json.loads(t) for t in Path("whole/metrics.jsonl").read_text().splitlines()]
    found = [line["test_accuracy"] for line in lines[1:]]
    assert f"the model is that of round {found.index(max(found)) + 1}" in out
    figures = json.loads(fedtorch("eval", "whole", "--json")[1])
    assert figures["test_accuracy"] == max(found)
    assert json.loads(Path("whole/summary.json").read_text())["test_accuracy"] == max(found)


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--monitor", "test_f1", "--stop-after", "2"],
            "watches 'test_f1', and there is no such figure",
        ),
        (["--monitor", "test_accuracy"], "monitor is for --stop-after 5 or --keep best"),
        (["--keep", "first"], "keep: expected one of last, best, got first"),
        (["--stop-after", "0"], "--stop-after must be at least 1"),
        (
            ["--stop-after", "2", "--finetune-steps", "2", "--validation", "0.2"],
            "which stop_after knows only when it is over",
        ),
        (
            [
                "--privacy",
                "sample",
                "--validation",
                "0.2",
                "--stop-after",
                "2",
                "--monitor",
                "validation_loss",
            ],
            "is made of clients' data and no noise covers it",
        ),
    ],
    ids=["unknown", "alone", "keep", "zero", "finetune", "private"],
)
def test_what_may_not_decide_is_refused_and_leaves_nothing(fedtorch, words, said):
    code, _, err = fedtorch(*SILENT, *words)
    assert code == 2 and said in err.replace("--stop-after knows", "stop_after knows"), err
    assert not Path("run/checkpoints").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_disk_too_full_to_begin_on_is_one_sentence(fedtorch, monkeypatch, error):
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("fedtorch.run.checkpoint.torch.save", full)
    code, _, err = fedtorch(*SMALL, "--model", "logistic")
    assert code == 2 and err.count("\n") == 1
    assert "run folder run cannot be written: " in err


def test_a_disk_too_full_for_the_model_is_an_error_that_says_how_to_go_on(fedtorch, monkeypatch):
    real = disk.whole

    def full(path: Path, private: bool = False) -> Any:
        if path.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        return real(path, private)

    quick = [*SILENT, "--model", "logistic"]
    with monkeypatch.context() as patch:
        patch.setattr(disk, "whole", full)
        code, _, err = fedtorch(*quick)
    assert code == 2 and err.count("\n") == 1
    assert "make room, then fedtorch train --run-dir run --resume" in err
    assert fedtorch("train", "--run-dir", "run", "--resume")[0] == 0
    assert fedtorch(*quick, "--run-dir", "whole")[0] == 0
    assert load_file("run/model.safetensors").keys() == load_file("whole/model.safetensors").keys()
    assert (
        Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    )
