"""How a server and a site end: the right exit code, one sentence, and nothing lost."""

import json
import os
import re
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from torch import nn

from fedtorch import Recipe, Server
from fedtorch import __main__ as program
from fedtorch.commands import sites as commands
from fedtorch.engines import wire
from fedtorch.engines.wire import Message
from fedtorch.run import checkpoint
from fedtorch.sites.engine import SitesSession
from fedtorch.sites.offer import Plan
from fedtorch.sites.options import ServeConfig
from fedtorch.sites.rpc import Listener
from fedtorch.sites.serve import make_plan
from fedtorch.types import ConfigError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def serve(tmp_path, capsys, monkeypatch):
    """``fedtorch serve`` in this process, with sites that are said to be there but never report."""
    monkeypatch.setattr(SitesSession, "wait_for_sites", lambda self, seconds: self.names)

    def run(*words):
        given = [
            "--sites",
            "north,south",
            "--insecure",
            "--input-shape",
            "[3]",
            "--model",
            "logistic",
        ]
        given += ["--address", "127.0.0.1:0", "--run-dir", str(tmp_path / "run"), "--rounds", "2"]
        code = program.main(["serve", *given, "--deadline", "0.1", *words])
        told = capsys.readouterr()
        run.out = told.out
        return code, (told.err.strip().splitlines() or [""])[-1]

    return run


def soon(number, ready):
    """Send this process a signal as soon as it is ready for it."""

    def send():
        end = time.monotonic() + 60
        while not ready() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.fixture
def told(monkeypatch):
    """What sites that are there at the end of a run would be told."""
    ends = []
    real = SitesSession.close

    def close(self):
        self.closing = True
        self.seen[self.names[0]] = time.monotonic()
        ends.append(wire.decode(self._fetch(self.names[0], Message("fetch"))).facts.get("why"))
        real(self)

    monkeypatch.setattr(SitesSession, "close", close)
    return ends


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), ValueError("row 3"), KeyboardInterrupt]
)
def test_sites_are_told_that_the_server_met_an_error_and_not_which(serve, monkeypatch, told, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(Server, "round", fail)
    with suppress(ValueError, KeyboardInterrupt):
        assert serve("--privacy", "none")[0] != 0
    assert told == ["error"]


def test_a_model_that_no_file_can_hold_is_refused_before_a_site_is_waited_for(serve, monkeypatch):
    class Versioned(nn.Linear):
        def get_extra_state(self):
            return {1, 2}

    monkeypatch.setattr(Plan, "build", lambda self: (Versioned(3, 2), Recipe()))
    monkeypatch.setattr(Listener, "__init__", lambda *args: pytest.fail("it listens"))
    code, said = serve("--privacy", "none")
    assert code == 2 and "a model file cannot hold" in said


def test_sites_that_stay_away_are_exit_1(serve, tmp_path, monkeypatch, told):
    monkeypatch.setattr(SitesSession, "wait_for_sites", lambda self, seconds: self.names[:1])
    code, said = serve("--minimum", "2", "--patience", "0.2", "--privacy", "none")
    assert code == 1 and "ended after 0 of 2 rounds: waited 0.2 s" in said
    assert "away are south" in said and "--resume" in said
    assert (tmp_path / "run/model.safetensors").exists()
    assert told == ["away"]


def test_a_spent_budget_is_exit_3_and_says_how_to_go_on(serve, tmp_path, told):
    plan = ["--privacy", "sample", "--privacy.noise-multiplier", "1.0", "--privacy.rounds", "1"]
    code, said = serve(*plan)
    assert code == 3 and "ended after 1 of 2 rounds: the privacy budget has no room" in said
    assert (tmp_path / "run/summary.json").exists()
    assert told == ["budget"]


def test_a_cohort_in_which_no_round_could_count_is_refused(serve):
    few = ["--participation", "uniform", "--participation.cohort-size", "1", "--privacy", "none"]
    code, said = serve(*few, "--minimum", "2")
    assert code == 2 and "participation asks 1 of the 2 sites at most, and 2 must report" in said
    assert serve(*few)[0] == 1  # nobody came, which is another thing


@pytest.mark.parametrize(
    "words, why",
    [
        (["--columns", "age,chol,age"], "--columns names 'age' twice"),
        (["--classes", "well,ill,dead"], "--classes names 3, and the model has outputs for 2"),
        (["--columns", ",".join(f"{k:0>40}" for k in range(900))], "too many for a plan"),
    ],
)
def test_names_that_no_site_could_have_are_refused(serve, words, why):
    code, said = serve(*words)
    assert code == 2 and why in said


def test_a_model_that_never_moved_is_exit_1(serve, told):
    code, said = serve("--privacy", "none")
    assert code == 1 and "the model never moved" in said
    assert told == ["still"]


def test_sites_are_told_the_learning_rate_that_was_asked_for_or_the_plans_own():
    for lr, told in ((0.03, 0.03), (None, 1.0)):
        config = ServeConfig(sites=["a"], input_shape=[3], insecure=True, lr=lr)
        assert make_plan(config, "r").lr == told


def test_a_run_that_is_done_is_told_as_that(serve, tmp_path, monkeypatch, told):
    monkeypatch.setattr(Server, "moved", lambda self: True)
    assert serve("--privacy", "none")[0] == 0 and told == [None]
    for said in (
        "2 sites, logistic, 2 rounds",
        "nothing is noised",
        "done: 2 rounds",
        "run folder: ",
    ):
        assert said in serve.out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["round"] for line in lines) == 2


def test_a_server_with_data_of_its_own_stops_early_and_keeps_the_best(
    serve, tmp_path, monkeypatch, told
):
    monkeypatch.setattr(Server, "moved", lambda self: True)
    own = tmp_path / "own.csv"
    own.write_text("a,b,c,ill\n" + "".join(f"{k},{k % 3},1,{k % 2}\n" for k in range(8)))
    data = ["--dataset", "csv", "--dataset.path", str(own), "--dataset.target", "ill"]
    early = ["--rounds", "9", "--stop-after", "1", "--keep", "best", "--privacy", "none"]
    assert serve(*data, *early)[0] == 0 and told == [None]
    said = "ended because test_loss was .* not got better in 1 rounds; the model is that of round 1"
    assert re.search(said, serve.out), serve.out
    assert json.loads((tmp_path / "run/summary.json").read_text())["rounds"] == 2


@pytest.mark.parametrize(
    "words, said",
    [
        (["--keep", "best"], "look at test_loss, and a server has no data unless it is given some"),
        (["--monitor", "test_accuracy"], "monitor is for --stop-after 5 or --keep best"),
        (["--address", "8443"], "address must be HOST:PORT, such as fed.example.org:8443"),
        (["--address", "localhost:99999"], "address must be HOST:PORT"),
        (["--sites", "a,a"], "--sites names 'a' twice"),
        (["--input-shape", "0"], "--input-shape must be whole numbers of at least 1, got [0]"),
    ],
    ids=["no data", "alone", "port", "large port", "twice", "nothing"],
)
def test_what_a_server_cannot_do_is_said_before_it_listens(serve, tmp_path, words, said):
    code, told = serve("--privacy", "none", *words)
    assert code == 2 and said in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_exits_with_the_signal_after_its_round(serve, tmp_path, number):
    soon(number, (tmp_path / "run/checkpoints/round-000003.pt").exists)
    code, said = serve("--privacy", "none", "--rounds", "100000")
    assert code == 128 + number and f"stopped by {signal.Signals(number).name}" in said
    done = checkpoint.load(tmp_path / "run/checkpoints")["round"]
    assert done >= 3 and f"ended after {done} of" in said


def test_a_full_disk_is_said_and_the_rounds_go_on(serve, tmp_path, monkeypatch, capsys):
    real, left = checkpoint.save, [1]  # room for the first checkpoint alone

    def save(*args, **kwargs):
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    code, said = serve("--privacy", "none")
    assert code == 1 and "the model never moved" in said  # and no traceback
    left.clear()
    code, said = serve("--privacy", "none", "--run-dir", str(tmp_path / "other"))
    assert code == 2 and "No space left on device" in said


def test_sites_keep_what_the_last_checkpoint_that_was_written_knows(serve, monkeypatch):
    real, save, room, told = SitesSession.submit, checkpoint.save, [1, 1], []

    def submit(self, ids, task):
        told.append(self.saved.get("north"))
        self.counted = {"north": f"{task.round:032x}"}
        real(self, ids, task)

    def saved(*args, **kwargs):
        if not room:
            raise OSError(28, "No space left on device")
        room.pop()
        return save(*args, **kwargs)

    monkeypatch.setattr(SitesSession, "submit", submit)
    monkeypatch.setattr(checkpoint, "save", saved)
    assert serve("--privacy", "none", "--rounds", "4")[0] == 1
    assert told == [None, *[f"{0:032x}"] * 3]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--models", "logistc"], "has no such model; did you mean logistic?"),
        (["--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--name", "a b"], "'a b' cannot be a site's name"),
        (["--server", "fed.example.org"], "server must be HOST:PORT"),
    ],
    ids=["model", "device", "name", "server"],
)
def test_what_a_site_cannot_do_is_said_before_it_calls(capsys, words, said):
    assert program.main(["site", "--insecure", "--name", "a", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.fixture
def site(tmp_path, capsys):
    """``fedtorch site`` in this process, whose server is not there."""
    np.savez(tmp_path / "rows.npz", x=np.zeros((6, 3), "f4"), y=np.arange(6) % 2)

    def run(*words):
        given = ["--server", "127.0.0.1:1", "--name", "north", "--insecure", "--dataset", "npz"]
        given += ["--dataset.path", str(tmp_path / "rows.npz"), "--state", str(tmp_path / "state")]
        code = program.main(["site", *given, *words])
        return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_site_that_is_stopped_says_so_and_lets_its_folder_go(site, caplog, number):
    before = signal.getsignal(number)
    soon(number, lambda: "cannot reach" in caplog.text)
    code, said = site()
    assert code == 128 + number and f"stopped by {signal.Signals(number).name}" in said
    assert signal.getsignal(number) is before
    code, _ = site("--patience", "0.1")  # the lock is free
    assert code == 1


def test_a_site_whose_disk_is_full_is_one_sentence(site, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "state/x")

    monkeypatch.setattr(commands, "Site", full)
    code, said = site()
    assert code == 2 and said == "fedtorch: state/x: No space left on device"


def test_eval_and_report_of_a_federation_judge_the_servers_own_rows(serve, tmp_path, capsys):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 3)).astype(np.float32)
    np.savez(tmp_path / "own.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    own = ["--outputs", "2", "--dataset", "npz", "--dataset.path", str(tmp_path / "own.npz")]
    own += ["--dataset.kind", "classification", "--dataset.classes", "0,1"]
    assert serve("--privacy", "none", *own)[0] == 1  # no site ever came
    folder = str(tmp_path / "run")
    assert program.main(["eval", folder, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert figures["test_loss"] == pytest.approx(summary["test_loss"])
    assert sum(map(sum, figures["confusion"]["counts"])) == 12
    assert program.main(["runs", folder]) == program.main(["report", folder]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "the model never moved" in page and "2 sites, logistic" in page and ">north</th>" in page
    assert serve("--privacy", "none", "--run-dir", str(tmp_path / "bare"))[0] == 1
    assert program.main(["eval", str(tmp_path / "bare")]) == 0
    told = capsys.readouterr()
    assert "the server of these sites has no test data of its own" in told.err
    assert "north" in told.out and "0 of 2" in told.out
    for name, said in (
        ("own.npz", "own.npz"),
        ("run/model.safetensors", "fedtorch serve --run-dir"),
        ("run/sites.json", "holds no run of sites"),
    ):
        (tmp_path / name).rename(tmp_path / "gone")
        assert program.main(["eval", folder]) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in told, told
        (tmp_path / "gone").rename(tmp_path / name)


def test_sites_wait_for_a_server_that_could_not_begin(serve, monkeypatch):
    from fedtorch.run import loop

    def refuse(*given, **more):
        raise ConfigError("the folder is another's")

    said = []
    real = SitesSession.close

    def close(self):
        self.closing = True
        said.append(wire.decode(self._fetch("north", Message("fetch"))))
        real(self)

    monkeypatch.setattr(loop, "open_folder", refuse)
    monkeypatch.setattr(SitesSession, "close", close)
    assert serve() == (2, "fedtorch: the folder is another's")
    assert [m.kind for m in said] == ["wait"]
