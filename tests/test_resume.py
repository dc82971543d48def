"""Stopped and continued is the same run: bit for bit, whatever stopped it."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from fedtorch import ConfigError, Server, disk
from fedtorch.__main__ import main
from fedtorch.run import checkpoint
from fedtorch.run.resume import of_clients

# client memory, server optimizer, dropped clients, a schedule and dropout: all there is to lose
RUN = [
    "train", "--privacy", "none", "--model", "wide.py", "--strategy", "scaffold",
    "--strategy.server", "adam", "--participation", "uniform", "--participation.cohort-size", "6",
    "--participation.dropout", "0.2", "--schedule", "exponential", "--optimizer.momentum", "0.9",
    "--lr", "0.02", "--engine.chunk", "3", "--drop-last", "--epochs", "1",
    "--tracking.pictures", "false",
]  # fmt: skip

MODEL = """
from torch import nn
def build(in_features: int, num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(in_features, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.ReLU(),
        nn.Linear(64, num_outputs),
    )
"""
SMALL = ["train", "--model", "logistic", "--clients", "4", "--epochs", "1", "--tracking", "none"]
PLAIN = [*SMALL, "--privacy", "none", "--strategy", "scaffold", "--lr", "0.05"]
TIGHT = [*SMALL, "--privacy", "sample", "--privacy.epsilon", "1", "--privacy.clip", "0.5"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Runs of one, two and three rounds, of which tests spoil or continue copies."""
    place = tmp_path_factory.mktemp("begun")
    (place / "wide.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_STATE_HOME", str(place / "state"))
        for name, words, rounds in (
            ("odd", RUN, 1), ("one", PLAIN, 1), ("two", PLAIN, 2), ("three", PLAIN, 3),
            ("tight", TIGHT, 1),
        ):  # fmt: skip
            assert main([*words, "--rounds", str(rounds), "--run-dir", name]) == 0
    return place


@pytest.fixture
def folder(fedtorch, tmp_path) -> Path:
    (tmp_path / "wide.py").write_text(MODEL)
    return tmp_path


def same(a: str | Path, b: str) -> None:
    one, two = (load_file(f"{f}/model.safetensors") for f in (a, b))
    assert all(torch.equal(one[k], two[k]) for k in one)
    for name in ("test_loss", "test_accuracy", "rounds"):
        first, second = (json.loads(Path(f"{f}/summary.json").read_text()) for f in (a, b))
        assert first[name] == second[name]
    assert figures(a) == figures(b)


def figures(run: str | Path) -> list[dict]:
    lines = [json.loads(line) for line in Path(f"{run}/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def steps(run: str) -> dict[str, list[int]]:
    """TensorBoard tag -> its steps, over all event files of the run."""
    found: dict[str, list[int]] = {}
    for path in sorted(Path(run).glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def start(*argv: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fedtorch", *argv], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_round(process: subprocess.Popen, run: str, n: int) -> None:
    lines = Path(run) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not lines.exists() or lines.read_text().count("\n") <= n:  # one more: round 0
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_n_and_m_rounds_are_n_plus_m(fedtorch, folder):
    assert fedtorch(*RUN, "--rounds", 5, "--run-dir", "whole")[0] == 0
    assert fedtorch(*RUN, "--rounds", 2, "--run-dir", "parts")[0] == 0
    code, out, _ = fedtorch(
        "train", "--resume", "--trust-code", "--run-dir", "parts", "--rounds", 5
    )
    assert code == 0
    assert "resumed after round 2" in out
    same("whole", "parts")


def test_killed_between_rounds_3_and_8_and_resumed_is_the_uninterrupted_run(fedtorch, folder):
    assert fedtorch(*RUN, "--rounds", 10, "--run-dir", "whole")[0] == 0
    pictures = ["--tracking.pictures", "true", "--tracking.every", "4"]
    process = start(*RUN, *pictures, "--rounds", "10", "--run-dir", "killed")
    wait_for_round(process, "killed", random.randint(3, 7))
    time.sleep(random.random() * 0.05)  # anywhere in a round, in a write too
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not Path("killed/summary.json").exists()
    whole = Path("killed/metrics.jsonl").read_text().endswith("\n")
    assert not whole or figures("killed")[-1]["round"] < 10
    code, _, err = fedtorch("train", "--resume", "--trust-code", "--run-dir", "killed")
    assert (code, err) == (0, "")
    same("whole", "killed")
    for tag, seen in steps("killed").items():
        assert len(seen) == len(set(seen)), f"{tag} has doubled steps {seen}"
    assert steps("killed")["test/accuracy"] == list(range(11))
    assert not list(Path("killed").rglob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_and_the_run_can_go_on(fedtorch, number):
    # far fewer checkpoints than rounds: what is saved is saved because of the signal
    rare = ["--checkpoint-every", "1000", "--eval-every", "1000"]
    process = start(*PLAIN, *rare, "--rounds", "100000", "--run-dir", "stopped")
    wait_for_round(process, "stopped", 1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert "stopped, saved" in out
    assert "--resume" in out
    reached = json.loads(Path("stopped/summary.json").read_text())
    assert reached["test_accuracy"] == figures("stopped")[-1]["test_accuracy"]
    goal = reached["rounds"] + 1
    assert fedtorch("train", "--resume", "--run-dir", "stopped", "--rounds", goal)[0] == 0
    assert fedtorch(*PLAIN, *rare, "--rounds", goal, "--run-dir", "straight")[0] == 0
    one, two = (load_file(f"{f}/model.safetensors") for f in ("stopped", "straight"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_finished_run_resumed_stays_as_it_is(fedtorch, folder):
    assert fedtorch(*RUN, "--rounds", 2, "--run-dir", "done")[0] == 0
    before = load_file("done/model.safetensors"), steps("done")
    assert fedtorch("train", "--resume", "--trust-code", "--run-dir", "done")[0] == 0
    after = load_file("done/model.safetensors"), steps("done")
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1] == after[1]


def test_a_run_killed_before_its_first_round_starts_again_without_doubles(fedtorch, folder):
    assert fedtorch(*RUN, "--rounds", 1, "--run-dir", "run")[0] == 0
    whole = steps("run")
    for path in Path("run/checkpoints").glob("round-000001.pt"):
        path.unlink()
    code, _, err = fedtorch("train", "--resume", "--trust-code", "--run-dir", "run")
    assert (code, err) == (0, "")
    assert steps("run") == whole


@pytest.mark.parametrize("plan", ["sample", "client", "local"])
def test_a_private_run_killed_before_its_first_charge_goes_on(fedtorch, monkeypatch, plan):
    def killed(self: Server) -> None:
        raise KeyboardInterrupt

    small = [
        "train",
        "--privacy",
        plan,
        "--model",
        "logistic",
        "--rounds",
        "1",
        "--tracking",
        "none",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Server, "round", killed)
        assert fedtorch(*small, "--run-dir", "run")[0] == 130
    assert len(Path("run/ledger.jsonl").read_text().splitlines()) == 1, "nothing is charged yet"
    code, _, err = fedtorch("train", "--resume", "--trust-code", "--run-dir", "run")
    assert (code, err) == (0, "")
    assert len(Path("run/ledger.jsonl").read_text().splitlines()) == 2
    assert json.loads(Path("run/summary.json").read_text())["epsilon"] > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (["--lr", "0.5"], "has lr = 0.02, not 0.5; a resumed run keeps it"),
        (["--strategy", "fedavg"], "has strategy = scaffold"),
        (["--seed", "9"], "has seed = 0, not 9"),
        (["--clients", "3"], "has clients = none, not 3"),
    ],
)
def test_what_would_make_it_another_run_is_refused(fedtorch, begun, folder, change, message):
    shutil.copytree(begun / "odd", "run")
    code, _, err = fedtorch(
        "train", "--resume", "--trust-code", "--run-dir", "run", "--rounds", 2, *change
    )
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def damaged(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        at = len(raw) // 2
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
    elif how == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif how == "pickle":
        torch.save(Payload(), path)
    elif how == "seed":
        torch.save(torch.load(path, weights_only=True) | {"seed": 5}, path)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "foreign", "pickle", "seed"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_goes_on(fedtorch, begun, how):
    shutil.copytree(begun / "two", "run")
    path = Path("run/checkpoints/round-000002.pt")
    damaged(path, how)
    code, out, err = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 3)
    assert (code, err) == (0, "")
    assert "round-000002.pt is corrupt or not a checkpoint" in out
    assert "going on from the one before, round 1" in out
    assert not Path("ran").exists()
    assert path.with_name("round-000002.pt.damaged").is_file()
    same(begun / "three", "run")


@pytest.mark.parametrize(
    "part, value, why",
    [
        ("round", "2", "'s round is not what this run keeps there"),
        ("round", -1, "'s round is not"),
        ("memory", None, "'s memory is not"),
        ("optimizer", [], "'s optimizer is not"),
        ("extras", {"c": {"1.weight": torch.zeros(2)}}, "'s extras.c.1.weight is not"),
        ("model", 3, "is not one that this run can go on from"),
    ],
    ids=["text", "negative", "none", "list", "shape", "number"],
)
def test_a_checkpoint_of_other_parts_is_one_sentence(fedtorch, begun, part, value, why):
    shutil.copytree(begun / "two", "run")
    path = Path("run/checkpoints/round-000002.pt")
    checkpoint.write(path, checkpoint.FORMAT, checkpoint.load(path.parent) | {part: value})
    code, _, err = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 3)
    assert code == 2 and why in err and err.count("\n") == 1


@pytest.mark.parametrize("how", ["cut", "pickle"])
def test_a_run_without_a_whole_checkpoint_is_one_sentence_and_stays_as_it_is(fedtorch, begun, how):
    shutil.copytree(begun / "one", "run")
    for path in Path("run/checkpoints").iterdir():
        damaged(path, how)
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    code, out, err = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 2)
    assert code == 2
    assert err.count("\n") == 1 and "nothing is left to go on from" in err
    assert "Traceback" not in out + err
    assert not Path("ran").exists()
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before


def test_a_private_run_that_falls_back_keeps_its_charges_and_draws_fresh_noise(fedtorch):
    private = [
        *SMALL,
        "--privacy",
        "sample",
        "--privacy.noise-multiplier",
        "1",
        "--privacy.rounds",
        "9",
    ]
    assert fedtorch(*private, "--rounds", 3, "--run-dir", "run")[0] == 0
    first = load_file("run/model.safetensors")
    spent = json.loads(Path("run/summary.json").read_text())["epsilon"]
    damaged(Path("run/checkpoints/round-000003.pt"), "cut")
    code, out, _ = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 3)
    assert code == 0 and "going on from the one before, round 2" in out
    charged = [
        json.loads(x)["round"] for x in Path("run/ledger.jsonl").read_text().splitlines()[1:]
    ]
    assert charged == [0, 1, 2, 2], "the round that is done again is charged again"
    assert json.loads(Path("run/summary.json").read_text())["epsilon"] > spent
    second = load_file("run/model.safetensors")
    assert not all(torch.equal(first[k], second[k]) for k in first), (
        "the noise is not the same again"
    )


CHANGES = [
    ("epsilon = 1.0", "epsilon = 8.0", "was 'epsilon = 1.0'"),
    ("clip = 0.5", "clip = 4.5", "was 'clip = 0.5'"),
    ("seed = 0", "seed = 1", "was 'seed = 0'"),
    ("[privacy]", "[strategy]", "was '[privacy]'"),
    (None, "# a line more", "lines were added"),
]


@pytest.mark.parametrize("was, new, message", CHANGES)
def test_another_config_is_refused_and_the_runs_own_can_be_had_again(
    fedtorch, begun, was, new, message
):
    shutil.copytree(begun / "tight", "run")
    path = Path("run/config.toml")
    text = path.read_text()
    path.write_text(text.replace(was, new) if was else f"{text}{new}\n")
    again = ["train", "--resume", "--run-dir", "run", "--rounds", 2]
    code, _, err = fedtorch(*again)
    assert code == 2 and err.count("\n") == 1
    assert message in err and "delete it, and --resume writes it as it was" in err
    path.unlink()
    code, out, _ = fedtorch(*again)
    assert code == 0 and "is written again from the checkpoint" in out
    assert path.read_text() == text


def test_a_config_cut_at_any_line_is_refused(fedtorch, begun):
    shutil.copytree(begun / "tight", "run")
    path = Path("run/config.toml")
    lines = path.read_text().splitlines(keepends=True)
    for count in range(len(lines)):
        path.write_text("".join(lines[:count]))
        code, _, err = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 30)
        assert code == 2 and "was changed after the run began" in err, count


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "gone"])
def test_a_damaged_record_is_said_and_put_aside(fedtorch, begun, how):
    shutil.copytree(begun / "two", "run")
    damaged(Path("run/metrics.jsonl"), how)
    code, out, err = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 3)
    assert (code, err) == (0, "")
    assert ("metrics.jsonl was damaged" in out) is (how != "gone")
    assert "metrics.jsonl lacks 2 of the 2 rounds so far" in out
    assert [f["round"] for f in figures("run")] == [3]


def test_a_folder_in_use_is_left_alone(fedtorch, begun):
    shutil.copytree(begun / "one", "run")
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    with disk.locked(Path("run")):
        code, _, err = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 2)
        assert code == 2 and err.count("\n") == 1 and "run is in use by another process" in err
        Path("new").mkdir()
        with disk.locked(Path("new")):
            code, _, err = fedtorch(*PLAIN, "--rounds", 1, "--run-dir", "new")
        assert code == 2 and "new is in use by another process" in err
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == before
    assert [p.name for p in Path("new").iterdir()] == [disk.LOCK]
    assert fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 2)[0] == 0


def test_a_run_holds_its_folder_while_it_trains(fedtorch, monkeypatch):
    real, seen = Server.round, []

    def look(self: Server) -> dict:
        with pytest.raises(ConfigError, match="in use"), disk.locked(Path("run")):
            pass
        seen.append(self.round_number)
        return real(self)

    monkeypatch.setattr(Server, "round", look)
    assert fedtorch(*PLAIN, "--rounds", 2, "--run-dir", "run")[0] == 0
    assert seen == [0, 1]
    with disk.locked(Path("run")) as note:
        assert note is None


def test_what_a_kill_left_half_written_goes(fedtorch, begun):
    shutil.copytree(begun / "one", "run")
    left = ["config.toml", "summary.json", "model.safetensors", "metrics.jsonl"]
    left += ["checkpoints/round-000001.pt"]
    for name in left:
        Path(f"run/{name}.part").write_bytes(b"half")
    Path("run/somebody.elses.part").write_bytes(b"kept")
    assert fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 2)[0] == 0
    assert [p.name for p in Path("run").rglob("*.part")] == ["somebody.elses.part"]


class Payload:
    """What a foreign pickle could do if it were ever unpickled."""

    def __reduce__(self):
        return (Path("ran").write_text, ("code ran",))


OWNED = (
    "train", "--dataset", "csv", "--dataset.path", "t.csv", "--dataset.client", "who",
    "--dataset.test-fraction", "0", "--dataset.classes", "0,1", "--model", "logistic",
    "--tracking", "none", "--rounds", "1", "--run-dir", "run", "--privacy.rounds", "3",
    "--privacy.delta", "1e-3",
)  # fmt: skip


def owned(names: str) -> str:
    rows = (f"{names[k % 3]},{k * 7 % 11 / 11},{k * 5 % 13 / 13},{k % 2}" for k in range(60))
    return "\n".join(["who,a,b,y", *rows])


def test_a_budget_is_not_spent_again_under_other_names(fedtorch):
    table = Path("t.csv")
    table.write_text(owned("ABC"))
    code, _, err = fedtorch(*OWNED)
    assert code == 0, err
    spent = Path("run/ledger.jsonl").read_text()
    # renamed, and the same names with one another's rows
    for names, data in (("XYZ", True), ("XYZ", False), ("BAC", True)):
        table.write_text(owned(names))
        kept = Path("run/data.json").read_bytes()
        if not data:
            Path("run/data.json").unlink()
        code, _, err = fedtorch("train", "--run-dir", "run", "--resume", "--rounds", 3)
        assert code == 2
        assert ("trained on other data" if data else "is of other clients than these 3") in err
        assert Path("run/ledger.jsonl").read_text() == spent
        Path("run/data.json").write_bytes(kept)


def test_the_same_data_may_lie_elsewhere_by_now(fedtorch):
    Path("t.csv").write_text(owned("ABC"))
    words = [w if w != "0" else "0.3" for w in OWNED]
    words = [*words[: words.index("--privacy.rounds")], "--privacy", "none"]
    assert fedtorch(*words)[0] == 0
    before = fedtorch("eval", "run")[1]
    Path("far").mkdir()
    Path("t.csv").rename("far/u.csv")
    assert fedtorch("eval", "run")[0] == 2
    assert fedtorch("eval", "run", "--dataset.path", "far/u.csv")[1] == before
    again = "train", "--run-dir", "run", "--resume", "--rounds", 2, "--dataset.path"
    assert fedtorch(*again, "far/u.csv")[0] == 0
    Path("far/u.csv").write_text(owned("ABC").replace("A,0.0", "A,0.5"))
    code, _, err = fedtorch(*again[:-1], "--dataset.path", "far/u.csv")
    assert code == 2 and "trained on other data" in err


def test_no_two_lists_of_names_are_taken_for_one():
    lists = ["a", "b", "c"], ["a\nb", "c"], ["a", "b\nc"], ["a\\nb", "c"], ["a\\", "nb\\", "c"]
    found = [of_clients(SimpleNamespace(ids=names))["clients"]["sha256"] for names in lists]
    assert len({*found}) == len(lists)
    assert found[0] == hashlib.sha256(b"a\nb\nc").hexdigest()  # as before
    of_clients(SimpleNamespace(ids=["caf\udce9"]))  # a folder's name that is no text
