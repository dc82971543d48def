"""Three hospitals over a SuperLink and three SuperNodes, beside our own line and Flower's own FedAvg.

    python -m benchmarks.flower_sites ../shared/data/heart-disease [own] [flower] [theirs]

Everything on loopback under TLS, each party a process as a user starts it. FedAvg, SCAFFOLD and
sample-level privacy over each line; without noise the weights must be those of one process. Over Flower's,
SCAFFOLD's run has a SuperNode and the server killed -9 in the middle. Bytes are what passed the server's
port, both ways, TLS and all, from the first round on; seconds are of a round.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from benchmarks.heart import hospitals
from fedtorch import Client, Local, Server, seeds
from fedtorch.data import Npz
from fedtorch.run import checkpoint, cli
from fedtorch.sites import keys
from fedtorch.sites.options import ServeConfig
from fedtorch.sites.serve import make_plan

NAMES = ("cleveland", "hungarian", "va")
ROUNDS = 20
PLAIN = ["--privacy", "none", "--lr", "1e-3", "--steps", "100", "--batch-size", "4"]
RUNS = {
    "FedAvg": PLAIN,
    "SCAFFOLD": [*PLAIN, "--strategy", "scaffold"],
    "sample-level": [
        *("--privacy", "sample", "--privacy.epsilon", "8", "--privacy.rounds", "22"),
        *("--privacy.sample-rate", "0.1", "--privacy.steps", "20", "--privacy.batch-size", "8"),
    ],
}
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
QUIET["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
WHILE_WE_LIVE = '"$@" & cat; kill -9 0'
"""For sh: run a command until nobody holds the other end of its input, however its owner ended."""
APP = """
from pathlib import Path
import numpy as np
import torch
from torch import nn
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client_app = ClientApp()
server_app = ServerApp()

@client_app.train()
def train(message, context):
    rows = np.load(str(context.node_config["rows"]))
    x, y = torch.tensor(rows["x"]).float(), torch.tensor(rows["y"]).float()
    model = nn.Linear(x.shape[1], 1)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(100):
        chosen = torch.randint(len(y), (4,))
        optimizer.zero_grad()
        output, target = model(x[chosen])[:, 0], y[chosen].ravel()
        nn.functional.binary_cross_entropy_with_logits(output, target).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(y)})
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

@server_app.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    arrays = ArrayRecord(nn.Linear(13, 1).state_dict())
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(context.run_config["rounds"]))
    Path(str(context.run_config["done"])).touch()
"""
PROJECT = """[project]
name = "heart"
version = "1.0.0"
description = ""
license = {{ text = "Apache-2.0" }}
dependencies = []
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "heart_app:server_app"
clientapp = "heart_app:client_app"
[tool.flwr.app.config]
rounds = {rounds}
done = "{done}"
"""


class Federation:
    """A SuperLink and its SuperNodes, each a process of Flower's own."""

    def __init__(self, folder: Path, names: tuple[str, ...], isolation: str = "process") -> None:
        self.folder, self.isolation = folder, isolation
        self.link, self.nodes = free_port(), {n: free_port() for n in names}
        self.running: dict[str, subprocess.Popen] = {}
        self.ca, self.secret = str(folder / "keys/server/ca.pem"), folder / "secret"
        self.secret.write_bytes(os.urandom(32))
        self.through = self.link
        """The port that SuperNodes call."""

    def start(self, name: str) -> None:
        """One of them: the SuperLink, called link, or a SuperNode."""
        keys, common = self.folder / "keys/server", ["--isolation", self.isolation]
        if self.isolation == "process":
            common += ["--superexec-auth-secret-file", str(self.secret)]
        if name == "link":
            command = ["flower-superlink", "--port", str(self.link), "--ssl-ca-certfile", self.ca]
            command += ["--ssl-certfile", str(keys / "cert.pem")]
            command += ["--ssl-keyfile", str(keys / "key.pem")]
            command += ["--disable-runtime-dependency-installation"]
        else:
            rows = f'rows="{self.folder / name}.npz"'
            command = ["flower-supernode", "--root-certificates", self.ca, "--node-config", rows]
            command += ["--superlink", f"127.0.0.1:{self.through}"]
            command += ["--port", str(self.nodes[name])]
        home = {"FLWR_HOME": str(self.folder / f"home-{name}")}
        found = Path(sys.executable).parent / command[0]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                ["sh", "-c", WHILE_WE_LIVE, str(found), str(found), *command[1:], *common],
                env=os.environ | QUIET | home,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def begin(self) -> None:
        """All of them."""
        self.start("link")
        up(self.link)
        for name in self.nodes:
            self.start(name)
        for port in self.nodes.values():
            up(port)

    def kill(self, name: str) -> None:
        """Kill -9."""
        process = self.running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    def close(self) -> None:
        """Leave no process behind."""
        for name in [*self.running]:
            self.kill(name)


class Counter:
    """Hands a port's bytes on to another and counts them, both ways."""

    def __init__(self, to: int) -> None:
        self.to, self.count = to, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with suppress(OSError):
            while True:
                one, _ = self.listener.accept()
                try:
                    other = socket.create_connection(("127.0.0.1", self.to))
                except OSError:  # nobody is there yet
                    one.close()
                    continue
                for a, b in ((one, other), (other, one)):
                    threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.count += len(data)
                to.sendall(data)
        for end in (source, to):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def up(port: int) -> None:
    """Wait until somebody listens there."""
    wait(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None, 120)


def wait(done: Callable[[], bool], seconds: float) -> None:
    """Poll; raises TimeoutError."""
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if done():
                return
        if time.monotonic() > end:
            raise TimeoutError("it did not come about")
        time.sleep(0.05)


def prepare(data: Path, folder: Path) -> None:
    """Each hospital's rows, and keys."""
    found = dict(
        zip(("cleveland", "hungarian", "switzerland", "va"), hospitals(data)[0], strict=True)
    )
    for name in NAMES:
        (x, y), (x_test, y_test) = found[name]
        rows = {"x": x, "y": y, "x_test": x_test, "y_test": y_test}
        np.savez(folder / f"{name}.npz", **{k: np.asarray(v) for k, v in rows.items()})
    keys.make(folder / "keys", ["localhost", "127.0.0.1"], list(NAMES), 2)


def fedtorch(folder: Path, log: str, *words: object) -> subprocess.Popen:
    """A command of ours."""
    with (folder / f"{log}.log").open("ab") as file:
        command = ["timeout", "1800", sys.executable, "-m", "fedtorch", *map(str, words)]
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | QUIET, start_new_session=True
        )


def trained(folder: Path, way: str, kind: str, federation: Federation | None, kills: bool) -> str:
    """One run; its figures in a line."""
    run = folder / f"{way} {kind}"
    own = free_port()
    counter = Counter(federation.link if federation else own)
    if federation:
        server = flower(federation.ca, federation.secret, federation.link)
    else:
        server = ["--address", f"127.0.0.1:{own}", "--credentials", folder / "keys/server"]
    words = ["serve", "--sites", ",".join(NAMES), "--minimum", 3, "--run-dir", run, *server]
    words += ["--input-shape", 13, "--kind", "binary", "--outputs", 1, "--model", "logistic"]
    words += ["--rounds", ROUNDS, *RUNS[kind]]
    if federation:
        federation.through = counter.port
        for name in NAMES:  # so that their bytes are counted
            if name in federation.running:
                federation.kill(name)
            federation.start(name)
            up(federation.nodes[name])
    processes = [fedtorch(folder, run.name, *words)]
    for name in NAMES:
        if federation:
            line = flower("", federation.secret, federation.nodes[name])
        else:
            line = [
                "--server",
                f"127.0.0.1:{counter.port}",
                "--credentials",
                folder / "keys" / name,
            ]
        words = ["site", "--name", name, "--state", run / name, "--dataset", "npz", *line]
        words += ["--dataset.path", folder / f"{name}.npz", "--dataset.kind", "binary"]
        processes.append(fedtorch(folder, f"{run.name} {name}", *words))
    first = counted(run, counter)
    if kills and federation:
        wait(lambda: done(run) >= 5, 600)
        federation.kill(NAMES[1])
        federation.start(NAMES[1])
        wait(lambda: done(run) >= 9, 600)
        os.killpg(processes[0].pid, signal.SIGKILL)
        processes[0].wait()
        processes[0] = fedtorch(folder, run.name, "serve", "--run-dir", run, "--resume")
    codes = [p.wait(600) for p in processes]
    if any(codes):
        raise SystemExit(f"{run.name}: {codes}, see {folder}")
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = statistics.median(r["seconds_train"] for r in rounds[1:])
    parts = [f"site_{n}_bytes_{w}" for n in NAMES for w in ("sent", "received")]
    told = sum(r.get(part, 0) for r in rounds[1:] for part in parts)
    passed = (counter.count - first) / (len(rounds) - 1)
    line = f"{way:<8} {kind:<13} {seconds:6.2f} s a round, {told / (len(rounds) - 1):9,.0f} B of messages"
    line += f", {passed:10,.0f} B at the port" if not kills else ", a node and the server killed"
    return line + ("" if kind == "sample-level" else f", weights within {apart(folder, run):.1g}")


def flower(ca: str, secret: Path, port: int) -> list[object]:
    """Options of engine flower."""
    given = ["--engine", "flower", "--engine.address", f"127.0.0.1:{port}"]
    return [*given, "--engine.secret", secret, *(["--engine.ca", ca] if ca else [])]


def done(run: Path) -> int:
    """Rounds in the run's record."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def counted(run: Path, counter: Counter) -> int:
    """Bytes that had passed when the first round was over."""
    wait(lambda: done(run) >= 1, 600)
    return counter.count


def apart(folder: Path, run: Path) -> float:
    """Without noise: how far the weights are from those of one process."""
    config = cli.parse(ServeConfig, ["--config", str(run / "config.toml")])
    with seeds.seeded(seeds.derive(config.seed, "model")):
        model, recipe = make_plan(config, "").build()
    data = [Npz(str(folder / f"{n}.npz"), kind="binary").load(0).train for n in NAMES]
    clients = [Client(n, d) for n, d in zip(NAMES, data, strict=True)]
    server = Server(model, clients, recipe, engine=Local(chunk=1), seed=config.seed)
    for _ in server.rounds(ROUNDS):
        pass
    got = checkpoint.load(run / "checkpoints")["model"]
    return max(float((v - got[k]).abs().max()) for k, v in server.model.state_dict().items())


def theirs(folder: Path, rounds: int) -> str:
    """Flower's own FedAvg as its documentation runs it: a process for each message."""
    app = folder / "heart"
    app.mkdir()
    (app / "heart_app.py").write_text(APP)
    (app / "pyproject.toml").write_text(PROJECT.format(rounds=rounds, done=folder / "over"))
    with closing(Federation(folder, NAMES, "subprocess")) as federation:
        federation.start("link")
        up(federation.link)
        counter = Counter(federation.link)
        federation.through = counter.port
        for name in NAMES:
            federation.start(name)
        home = folder / "home"
        home.mkdir()
        address = (
            f'address = "127.0.0.1:{federation.link}"\nroot-certificates = "{federation.ca}"\n'
        )
        (home / "config.toml").write_text(f'[superlink]\ndefault = "p"\n[superlink.p]\n{address}')
        time.sleep(10)
        before, began = counter.count, time.monotonic()
        subprocess.run(
            [str(Path(sys.executable).parent / "flwr"), "run", str(app), "p"],
            env=os.environ | QUIET | {"FLWR_HOME": str(home)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        wait(lambda: (folder / "over").exists(), 900)
        seconds = (time.monotonic() - began) / rounds
        passed = (counter.count - before) / rounds
    return f"Flower's own FedAvg    {seconds:6.2f} s a round, {passed:10,.0f} B at the port"


def main(data: Path, *lines: str) -> None:
    """Every line and kind in turn, or those lines that are named: own, flower, theirs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(data, folder)
        for kind in RUNS if not lines or "own" in lines else ():
            print(trained(folder, "own", kind, None, False), flush=True)
        if not lines or "flower" in lines:
            with closing(Federation(folder, NAMES)) as federation:
                federation.start("link")
                up(federation.link)
                for kind in RUNS:
                    kills = kind == "SCAFFOLD"
                    print(trained(folder, "Flower", kind, federation, kills), flush=True)
        if not lines or "theirs" in lines:
            print(theirs(folder, 3), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
