"""kill -9 of a site and of the server while rounds run: the run ends, and no charge is lost."""

import json
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from fedtorch.sites import keys

pytestmark = pytest.mark.timeout(300)
NAMES = ["north", "south"]
ROUNDS = 12


@pytest.fixture
def federation(tmp_path):
    """A folder for each party, and what starts them; whatever still runs at the end is killed."""
    keys.make(tmp_path / "keys", ["127.0.0.1"], NAMES, 2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    rng = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / name).mkdir()
        x = rng.normal(size=(200, 6)).astype(np.float32)
        np.savez(tmp_path / name / "rows.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    (tmp_path / "serve.toml").write_text(
        f'sites = {NAMES}\naddress = "127.0.0.1:{port}"\ncredentials = "{tmp_path}/keys/server"\n'
        f'run_dir = "{tmp_path}/run"\ninput_shape = [6]\nmodel = "mlp"\nrounds = {ROUNDS}\n'
        "minimum = 2\ndeadline = 60.0\n"
        '[privacy]\nname = "sample"\nnoise_multiplier = 3.0\nsteps = 20\n'
    )
    started = []

    def start(*words):
        process = subprocess.Popen(
            [sys.executable, "-m", "fedtorch", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    def site(name):
        own = tmp_path / name
        flags = f"--server 127.0.0.1:{port} --name {name} --dataset npz --max-epsilon 100"
        paths = ["--dataset.path", own / "rows.npz", "--state", own / "state"]
        return start("site", *flags.split(), *paths, "--credentials", tmp_path / "keys" / name)

    yield tmp_path, start, site
    for process in started:
        process.kill()
        process.communicate()


def rounds_done(folder):
    path = folder / "run/metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(folder, rounds):
    end = time.monotonic() + 120
    while rounds_done(folder) < rounds:
        assert time.monotonic() < end, f"round {rounds} never came"
        time.sleep(0.02)


def kill(process):
    process.kill()
    process.wait()


def charged(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_a_run_outlives_kill_9_of_a_site_and_of_the_server(federation):
    folder, start, site = federation
    server = start("serve", folder / "serve.toml")
    north, south = site("north"), site("south")
    wait_for(folder, 2)
    time.sleep(0.1)  # in the middle of round 3
    kill(north)
    north = site("north")
    wait_for(folder, 5)
    time.sleep(0.1)
    kill(server)  # the sites stay up
    server = start("serve", "--run-dir", folder / "run", "--resume")
    for process in (server, north, south):
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["rounds"] == ROUNDS and rounds_done(folder) == ROUNDS
    # every round is in the server's book, and every visit a site did in that site's own, which holds
    # at least what the server's does: a visit done twice is charged twice
    server_rounds = [e["round"] for e in charged(folder / "run/ledger.jsonl")]
    assert {*server_rounds} == {*range(ROUNDS)}
    for name in NAMES:
        own = [e["round"] for e in charged(folder / name / "state/ledger-example.jsonl")]
        assert {*own} == {*range(ROUNDS)} and len(own) >= ROUNDS
