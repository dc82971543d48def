"""What a round costs on each engine beside the training: ``python -m benchmarks.engines [growth]``.

Two clients of four examples each take one step, so that nearly all of a round is moving weights. Each
engine is timed in turn on the same model, with two workers, actors or site processes, whose memory is
looked at after the last round. ``growth`` trains 10,000 clients in worker processes for 200 rounds and
fails when this process or a worker has grown.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtorch import Client, Local, Recipe, Server
from fedtorch.data.base import facts_of
from fedtorch.engines import Processes, Ray
from fedtorch.run import zoo
from fedtorch.sites import keys, offer
from fedtorch.sites.engine import Sites, remotes

NAMES = ["north", "south"]
WIDTHS = {"1.7 MB": 370, "45 MB": 2980}
RECIPE = Recipe(lr=0.1, batch_size=None)
MOST_GROWTH = 4.0
"""MiB a process may grow in 190 rounds."""


def main() -> None:
    """Time every engine on both models, or watch the memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", default="rounds", choices=["rounds", "growth"])
    torch.set_num_threads(1)
    if parser.parse_args().what == "growth":
        growth()
        return
    for label, width in WIDTHS.items():
        base = 0.0
        for name in ("local", "processes", "ray", "sites"):
            start = time.perf_counter()
            seconds, ready = sites(width) if name == "sites" else engine(name, width)
            median = statistics.median(seconds)
            base = base or median
            print(
                f"{label} {name:9}: ready {ready - start:5.1f} s, round {median * 1e3:7.1f} ms, "
                f"{(median - base) * 1e3:+7.1f} ms beside local",
                flush=True,
            )


def model(width: int) -> nn.Module:
    """An MLP on 784 inputs."""
    torch.manual_seed(0)
    return zoo.build("mlp", facts_of((784,), 10, "classification"), {"hidden": width})


def engine(name: str, width: int) -> tuple[list[float], float]:
    """Seconds of each round after two to warm up, and when the engine was ready."""
    data = [(torch.randn(4, 784), torch.arange(4)) for _ in NAMES]
    clients = [Client(n, d) for n, d in zip(NAMES, data, strict=True)]
    made = {
        "local": Local(chunk=1),
        "processes": Processes(workers=2, chunk=1),
        "ray": Ray(workers=2, chunk=1),
    }[name]
    server = Server(model(width), clients, RECIPE, engine=made)
    session: Any = server.session
    ready = time.perf_counter()
    seconds = timed(server)
    for worker in getattr(session, "workers", []):
        print(f"    worker: {memory(worker.process.pid)}")
    for actor in getattr(session, "actors", []):
        import ray

        pid = ray.get(actor.handle.__ray_call__.remote(lambda _: os.getpid()))
        print(f"    actor: {memory(pid)}")
    server.close()
    return seconds, ready


def sites(width: int) -> tuple[list[float], float]:
    """The same over TLS on loopback, each site a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys.make(folder, ["127.0.0.1"], NAMES, 2)
        facts = facts_of((784,), 10, "classification")
        offered = offer.Plan("bench", "mlp", {"hidden": width}, facts, batch_size=None)
        network, recipe = offered.build()
        made = Sites(plan=offered, address="127.0.0.1:0", keys=folder / "server", minimum=2)
        server = Server(network, remotes(NAMES), recipe, engine=made)
        with joined(server, folder) as started:
            ready = time.perf_counter()
            seconds = timed(server)
            for process in started:
                print(f"    site: {memory(process.pid)}")
    return seconds, ready


@contextmanager
def joined(server: Server, folder: Path) -> Iterator[list[subprocess.Popen]]:
    """The processes of sites that have joined; in the end server and sites are gone."""
    session: Any = server.session
    started = [start(folder, name, session.port) for name in NAMES]
    try:
        session.wait_for_sites(120)
        yield started
        server.close()
        for process in started:
            process.wait(60)
    finally:
        for process in started:
            process.kill()


def start(folder: Path, name: str, port: int) -> subprocess.Popen:
    """A site's process, as a user would start it."""
    path = folder / f"{name}.npz"
    np.savez(path, x=np.random.randn(40, 784).astype(np.float32), y=np.arange(40) % 10)
    options = {
        "server": f"127.0.0.1:{port}",
        "name": name,
        "dataset": "npz",
        "dataset.path": path,
        "dataset.kind": "classification",
        "credentials": folder / name,
        "state": folder / name / "state",
    }
    words = [str(w) for k, v in options.items() for w in (f"--{k}", v)]
    log = (folder / f"{name}.log").open("w")
    return subprocess.Popen([sys.executable, "-m", "fedtorch", "site", *words], stderr=log)


def timed(server: Server, rounds: int = 12) -> list[float]:
    """Seconds of each round but the first two."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        server.round()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def growth() -> None:
    """Memory over 200 rounds of 10,000 clients; fails when it grew after round 10."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(10_000, 4, 20, generator=g), torch.randint(0, 5, (10_000, 4), generator=g)
    clients = [Client(f"c{k}", (data[0][k], data[1][k])) for k in range(10_000)]
    server = Server(nn.Linear(20, 5), clients, RECIPE, engine=Processes(workers=2))
    session: Any = server.session
    pids = ["self", *(w.process.pid for w in session.workers)]
    start, warm = time.perf_counter(), [0.0] * len(pids)
    for _ in range(200):
        number = server.round()["round"]
        if number in (1, 10, 50, 100, 150, 200):
            sizes = [resident(p)["Rss:"] for p in pids]
            warm = sizes if number == 10 else warm
            told = "; ".join(f"{size:.1f}" for size in sizes)
            print(f"round {number:3}, {time.perf_counter() - start:5.0f} s: {told} MiB", flush=True)
    server.close()
    grown = max(size - early for size, early in zip(sizes, warm, strict=True))
    print(f"grown by at most {grown:.1f} MiB since round 10")
    if grown > MOST_GROWTH:
        raise SystemExit(f"memory grew by more than {MOST_GROWTH} MiB")


def resident(pid: int | str) -> dict[str, float]:
    """Kinds of resident memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return {line.split()[0]: int(line.split()[1]) / 1024 for line in lines[1:]}


def memory(pid: int | str) -> str:
    """Resident memory of a process, and its share of what it shares with others."""
    sizes = resident(pid)
    return f"{sizes['Rss:']:.0f} MiB resident, {sizes['Pss:']:.0f} MiB its own share"


if __name__ == "__main__":
    main()
