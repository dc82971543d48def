"""What a round costs on each engine beside the training: ``python -m benchmarks.engines [growth]``.

Two clients of four examples each take one step, so that nearly all of a round is moving weights. Each
engine is timed in turn on the same model; ``growth`` trains 10,000 clients in worker processes for 200
rounds and watches the memory of this process and of the workers.
"""

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedtorch import Client, Local, Recipe, Server, zoo
from fedtorch.data import Npz
from fedtorch.data.base import facts_of
from fedtorch.engines import Processes, Ray
from fedtorch.sites import keys, plan
from fedtorch.sites.engine import Sites, remotes
from fedtorch.sites.site import Site, SiteConfig

NAMES = ["north", "south"]
WIDTHS = {"1.7 MB": 370, "45 MB": 2980}
RECIPE = Recipe(lr=0.1, batch_size=None)


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


def engine(name: str, width: int, rounds: int = 12) -> tuple[list[float], float]:
    """Seconds of each round after two to warm up, and when the engine was ready."""
    data = [(torch.randn(4, 784), torch.arange(4)) for _ in NAMES]
    clients = [Client(n, d) for n, d in zip(NAMES, data, strict=True)]
    made = {"local": Local(1), "processes": Processes(2, 1), "ray": Ray(2, 1)}[name]
    server = Server(model(width), clients, RECIPE, engine=made)
    ready = time.perf_counter()
    seconds = timed(server, rounds)
    for worker in getattr(server.session, "workers", []):
        print(f"    worker: {memory(worker.process.pid)}")
    server.close()
    return seconds, ready


def sites(width: int, rounds: int = 12) -> tuple[list[float], float]:
    """The same over TLS on loopback, both sites in threads of this process."""
    folder = Path(tempfile.mkdtemp())
    keys.make(folder, ["127.0.0.1"], NAMES, 2)
    facts = facts_of((784,), 10, "classification")
    offered = plan.Plan("bench", "mlp", {"hidden": width}, facts, batch_size=None)
    network, recipe = offered.build()
    engine = Sites(offered, "127.0.0.1:0", folder / "server")
    server = Server(network, remotes(NAMES), recipe, engine=engine)
    threads = []
    for name in NAMES:
        path = folder / f"{name}.npz"
        np.savez(path, x=np.random.randn(12, 784).astype(np.float32), y=np.arange(12) % 10)
        config = SiteConfig(
            server=f"127.0.0.1:{server.session.port}",  # type: ignore[attr-defined]
            name=name,
            dataset=Npz(str(path)),
            credentials=str(folder / name),
            state=str(folder / name / "state"),
        )
        threads.append(threading.Thread(target=Site(config).run))
        threads[-1].start()
    ready = time.perf_counter()
    seconds = timed(server, rounds)
    server.close()
    for thread in threads:
        thread.join()
    return seconds, ready


def timed(server: Server, rounds: int) -> list[float]:
    """Seconds of each round but the first two."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        server.round()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def growth() -> None:
    """Memory over 200 rounds of 10,000 clients."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(10_000, 4, 20, generator=g), torch.randint(0, 5, (10_000, 4), generator=g)
    clients = [Client(f"c{k}", (data[0][k], data[1][k])) for k in range(10_000)]
    server = Server(nn.Linear(20, 5), clients, RECIPE, engine=Processes(2))
    workers = [w.process.pid for w in server.session.workers]  # type: ignore[attr-defined]
    start = time.perf_counter()
    for _ in range(200):
        figures = server.round()
        if figures["round"] in (1, 10, 50, 100, 150, 200):
            told = "; ".join(memory(p) for p in ("self", *workers))
            print(
                f"round {figures['round']:3}, {time.perf_counter() - start:5.0f} s: {told}",
                flush=True,
            )
    server.close()


def memory(pid: int | str) -> str:
    """Resident memory of a process, and its share of what it shares with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) >> 10 for line in lines[1:]}
    return f"{sizes['Rss:']} MB resident, {sizes['Pss:']} MB its own share"


if __name__ == "__main__":
    main()
