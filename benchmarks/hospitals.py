"""Four hospitals train together over TLS, with ``kill -9`` in the middle; every promise is checked.

    python -m benchmarks.hospitals ../shared/data/heart-disease

Each hospital's table goes to a folder of its own, keys are made with ``fedtorch keys``, and then one
``fedtorch serve`` and four ``fedtorch site`` processes run as a user would start them (a witness notes what
each opens and what the server receives, see ``benchmarks.witness``; strace does so from outside). A site
is killed in the middle of a visit, the server while it holds some reports of a round and waits for
another. Both are started again. ``benchmarks.hospitals_checks`` says what must hold afterwards. Twice:
with privacy, from the files as UCI has them, scaled by private statistics of all four, and without, from
arrays, where the weights must also be those of an undisturbed run in one process.
"""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import hospitals_checks as checks
from benchmarks.heart import HOSPITALS, hospitals
from fedtorch.__main__ import main as command
from fedtorch.data import Csv, Npz
from fedtorch.engines import wire
from fedtorch.run import checkpoint

ROOT = Path(__file__).parents[1]
PRIVATE = (
    '[privacy]\nname = "sample"\nsample_rate = 0.1\nsteps = 20\nbatch_size = 8.0\nepsilon = 8.0\n'
)
BOUNDS = ["age=0:120", "trestbps=0:250", "chol=0:600", "thalach=0:250", "oldpeak=-5:10"]
SCALED = f"standardize = {BOUNDS}\nlr = 0.5\n".replace("'", '"')
RUNS = {
    "private": SCALED + PRIVATE + "rounds = {planned}\n",
    # SCAFFOLD, because its sites remember: what a kill makes them forget would show in the weights
    "plain": 'privacy = "none"\nstrategy = "scaffold"\nlr = 1e-3\nsteps = 100\nbatch_size = 4\n',
}
COLUMNS = "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,num"
AS_DOWNLOADED = {
    "columns": COLUMNS.split(","),
    "drop": ["slope", "ca", "thal"],
    "positive": ["1", "2", "3", "4"],
    "missing": "drop",
    "test_fraction": 0.34,
    "categories": ["cp=1|2|3|4", "restecg=0|1|2"],
    "standardize": "private",
    "bounds": BOUNDS,
}
"""How a file of UCI's is read, as README's command does."""
STRACE = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=open,openat,openat2", "-o"]


@dataclass
class Trial:
    """One federation on this machine."""

    folder: Path
    rounds: int
    strace: bool
    spare: int = 2
    """Rounds the privacy plan pays for beyond those to train: one for each kill."""
    scaled: bool = False
    """Sites read the files as UCI has them, scaled by private statistics of all, and not arrays."""
    names: tuple[str, ...] = HOSPITALS
    port: int = 0
    minimum: int = 4
    """Sites that must report for a round to count."""
    extra: dict[str, str] = field(default_factory=dict)
    """Further options of every site."""
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def prepare(self, data: Path, text: str) -> None:
        """Tables, keys and the server's configuration, of which ``text`` says how it trains."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        for name, ((x, y), (x_test, y_test)) in zip(HOSPITALS, hospitals(data)[0], strict=True):
            if name not in self.names:
                continue
            (self.folder / name).mkdir()
            rows = {"x": x, "y": y, "x_test": x_test, "y_test": y_test}
            if self.scaled:
                shutil.copy(data / f"processed.{name}.data", self.rows(name))
            else:
                np.savez(self.rows(name), **{k: np.asarray(v) for k, v in rows.items()})
        keys = ["keys", str(self.folder / "keys"), "--server", "127.0.0.1", "--sites"]
        with redirect_stdout(io.StringIO()):
            assert command([*keys, ",".join(self.names)]) == 0
        (self.folder / "serve.toml").write_text(
            f'sites = {list(self.names)}\naddress = "127.0.0.1:{self.port}"\nminimum = {self.minimum}\n'
            f'credentials = "{self.folder}/keys/server"\nrun_dir = "{self.folder}/run"\n'
            f'input_shape = [{self.inputs}]\nkind = "binary"\noutputs = 1\nmodel = "logistic"\n'
            f"rounds = {self.rounds}\ndeadline = 120.0\n"
            + text.format(planned=self.rounds + self.spare)
        )

    @property
    def inputs(self) -> int:
        """Inputs of the model: of the files with an input for any other category, too."""
        return 17 if self.scaled else 13

    def rows(self, name: str) -> Path:
        """A hospital's own table."""
        return self.folder / name / ("rows.csv" if self.scaled else "rows.npz")

    def table(self, name: str) -> Csv | Npz:
        """How it is read."""
        path = str(self.rows(name))
        return Csv(path, **AS_DOWNLOADED) if self.scaled else Npz(path, kind="binary")  # type: ignore[arg-type]

    def start(self, who: str, *more: str) -> None:
        """Start the server or a site, as a user would; ``more`` are further options of the server."""
        words = ["serve", *(more or [str(self.folder / "serve.toml")])]
        if who != "server":
            options: dict[str, object] = {
                "server": f"127.0.0.1:{self.port}",
                "name": who,
                "credentials": self.folder / "keys" / who,
                "state": self.folder / who / "state",
                "dataset": "csv" if self.scaled else "npz",
                "dataset.path": self.rows(who),
                "models": "logistic",
                **self.extra,
            }
            given = AS_DOWNLOADED if self.scaled else {"kind": "binary"}
            options |= {
                f"dataset.{k}": ",".join(v) if isinstance(v, list) else v for k, v in given.items()
            }
            if "epsilon" in (self.folder / "serve.toml").read_text():
                options["max-epsilon"] = 8.0
            words = ["site", *(str(w) for k, v in options.items() for w in (f"--{k}", v))]
        notes = self.folder / "notes" / who
        notes.mkdir(parents=True, exist_ok=True)
        (notes / "pid").unlink(missing_ok=True)
        tracer = [*STRACE, str(notes / f"strace-{time.time_ns()}.txt")] if self.strace else []
        log = (notes / "log.txt").open("ab")
        watched = [*tracer, sys.executable, "-m", "benchmarks.witness", str(notes), *words]
        self.processes[who] = subprocess.Popen(watched, cwd=ROOT, stdout=log, stderr=log)
        log.close()

    def pid(self, who: str) -> int:
        """Process id of a party (strace, where it runs, has one of its own)."""
        path = self.folder / "notes" / who / "pid"
        self.wait(lambda: path.exists() and path.read_text() != "", f"{who} to start")
        return int(path.read_text())

    def kill(self, who: str) -> None:
        """Kill -9."""
        os.kill(self.pid(who), signal.SIGKILL)
        self.processes[who].wait()

    def received(self) -> list[dict[str, Any]]:
        """Every message the server has taken so far, over all its processes."""
        path = self.folder / "notes/server/received.jsonl"
        text = path.read_bytes() if path.exists() else b""
        lines = [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
        for line in lines:
            line["data"] = base64.b64decode(line["data"])
        return lines

    def reports(self, round: int) -> set[str]:
        """Sites whose report of a round (from 0) the server has."""
        found = [m for m in self.received() if m["method"] == "report"]
        return {m["site"] for m in found if wire.decode(m["data"]).facts["round"] == round}

    def begun(self, site: str) -> list[int]:
        """Rounds (from 0) of a site's visits: those it was charged for, or those it has a task for."""
        ledger = self.folder / site / "state/ledger-example.jsonl"
        if ledger.exists():
            text = ledger.read_text()
            all_ = [json.loads(t)["round"] for t in text[: text.rfind("\n")].splitlines()[1:]]
            return [round for round in all_ if round >= 0]  # before the first there are statistics
        tasks = [m for m in self.received() if m["site"] == site and m["answer"] == "task"]
        return [m["given"] for m in tasks]

    def rounds_done(self) -> int:
        """Rounds that are in the run's record."""
        path = self.folder / "run/metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait(self, done: Callable[[], bool], what: str, pause: float = 0.05) -> None:
        """Poll until ``done``; raises Broken when it takes too long or somebody ended in failure."""
        end = time.monotonic() + 120
        while not done():
            ill = [who for who, p in self.processes.items() if p.poll()]
            late = time.monotonic() > end
            checks.demand(not ill and not late, f"{what} came", f"{ill} {self.log(*ill)}")
            time.sleep(pause)

    def log(self, *who: str) -> str:
        """The end of what parties have written."""
        texts = [(self.folder / "notes" / w / "log.txt").read_text() for w in who]
        return "\n".join(t[-1000:] for t in texts)

    def finish(self) -> None:
        """Wait for everybody to end by themselves."""
        for who, process in self.processes.items():
            code = process.wait(timeout=300)
            checks.demand(code == 0, f"{who} ended by itself and well", self.log(who))

    def close(self) -> None:
        """Leave no process behind, whatever happened."""
        for who, process in self.processes.items():
            if process.poll() is None:
                path = self.folder / "notes" / who / "pid"
                if path.exists():  # under strace the process is strace's child
                    os.kill(int(path.read_text()), signal.SIGKILL)
                process.kill()
            process.wait()


def kill_in_visit(trial: Trial, site: str) -> int:
    """Kill -9 a site that has begun a visit and not yet reported; returns the round."""
    while trial.rounds_done() < trial.rounds - 3:
        before = len(trial.begun(site))
        trial.wait(lambda n=before: len(trial.begun(site)) > n, f"a visit of {site}", 0.003)  # type: ignore[misc]
        os.kill(trial.pid(site), signal.SIGSTOP)
        time.sleep(0.3)  # whatever it had sent has arrived by now
        round = trial.begun(site)[-1]
        if site not in trial.reports(round):
            trial.kill(site)
            return round
        os.kill(trial.pid(site), signal.SIGCONT)
    raise checks.Broken(f"{site} was never caught in a visit")


def kill_in_round(trial: Trial, held_back: str) -> int:
    """Kill -9 the server while it has all reports of a round but one; returns the round."""
    os.kill(trial.pid(held_back), signal.SIGSTOP)
    time.sleep(0.3)
    trial.wait(
        lambda: trial.reports(trial.rounds_done()) >= {*trial.names} - {held_back},
        "the other sites' reports",
    )
    round = trial.rounds_done()
    state = checkpoint.load(trial.folder / "run/checkpoints")
    checks.demand(
        state["round"] == round and held_back not in trial.reports(round),
        f"the server is killed in the middle of round {round + 1}",
    )
    trial.kill("server")
    os.kill(trial.pid(held_back), signal.SIGCONT)
    return round


def run(trial: Trial) -> dict[str, int]:
    """All of it; returns the rounds (from 0) in which a site and the server were killed."""
    for who in ("server", *trial.names):
        trial.start(who)
    trial.wait(lambda: trial.rounds_done() >= 2, "round 2")
    first = kill_in_visit(trial, trial.names[0])
    trial.start(trial.names[0])
    trial.wait(lambda: trial.rounds_done() > first + 1, "the round after the kill")
    second = kill_in_round(trial, trial.names[-1])
    trial.start("server", "--run-dir", str(trial.folder / "run"), "--resume")
    trial.finish()
    return {trial.names[0]: first, "server": second}


def main(data: Path, rounds: int = 20) -> None:
    """Both trials."""
    if shutil.which("strace") is None:
        raise SystemExit("hospitals needs strace: the published trial is watched from outside too")
    for kind, text in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(Path(folder), rounds, strace=True, scaled=kind == "private")
            began = time.perf_counter()
            try:
                trial.prepare(data, text)
                killed = run(trial)
            finally:
                trial.close()
            print(f"{kind}: {time.perf_counter() - began:.1f} s, kills included")
            for line in checks.everything(trial, data, killed):
                print(f"  {line}")


if __name__ == "__main__":
    if "--secure" in sys.argv:
        from benchmarks.hospitals_secure import main
    main(Path(sys.argv[1]))
