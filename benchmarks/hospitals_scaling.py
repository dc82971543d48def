"""Private scaling of hospitals' columns over sites, beside public bounds.

    python -m benchmarks.hospitals_scaling ../shared/data/heart-disease

A server and four sites on loopback, in threads of one process, each site with its file as UCI has it. The
statistics come in a round before the first. Sample level at epsilon 8, 20 rounds; accuracy of the last
model on the held-out third of all hospitals together. Seeds 0 to 4 draw initial weights; the noise of
each run is its own, the split always the same.
"""

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.heart import HOSPITALS
from benchmarks.heart_tables import CLOSE, ROUGH
from benchmarks.hospitals import AS_DOWNLOADED
from fedtorch import Server, seeds
from fedtorch.data import Csv
from fedtorch.privacy import SampleLevel
from fedtorch.sites.engine import Sites, SitesSession, remotes
from fedtorch.sites.options import ServeConfig, SiteConfig
from fedtorch.sites.serve import make_plan
from fedtorch.sites.site import Site

ROUNDS, SEEDS = 20, range(5)
WAYS = {
    "private statistics": {"standardize": "private", "bounds": ROUGH.split(",")},
    "public bounds, close": {"standardize": False, "bounds": CLOSE.split(",")},
}


def main(data: Path) -> None:
    """Each way with each seed."""
    for way, scaling in WAYS.items():
        found = [accuracy(data, scaling, seed) for seed in SEEDS]
        each = ", ".join(f"{v:.3f}" for v in found)
        mean, spread = statistics.mean(found), statistics.stdev(found)
        print(f"{way:<21} {mean:.3f} +- {spread:.3f} ({each})", flush=True)


def accuracy(data: Path, scaling: dict[str, Any], seed: int) -> float:
    """Of one run."""
    private = scaling["standardize"] == "private"
    plan = make_plan(
        ServeConfig(
            sites=[*HOSPITALS],
            insecure=True,
            **{"input_shape": [17], "kind": "binary", "outputs": 1, "model": "logistic"},
            **{"rounds": ROUNDS, "lr": 0.5, "standardize": scaling["bounds"] if private else []},
            privacy=SampleLevel(
                epsilon=8.0,
                **{"sample_rate": 0.1, "steps": 20, "batch_size": 8.0, "rounds": ROUNDS},
                mode="stacked",  # torch.fx, which looks at a model for other modes, is not for threads
            ),
        ),
        "scaling",
    )
    with seeds.seeded(seed):
        model, recipe = plan.build()
    engine = Sites(plan=plan, address="127.0.0.1:0", deadline=120.0, minimum=4)
    server = Server(model, remotes(HOSPITALS), recipe, engine=engine, seed=seed)
    session = server.session
    assert isinstance(session, SitesSession)
    with tempfile.TemporaryDirectory() as state:
        made = [Site(site(data, state, n, session.port, scaling)) for n in HOSPITALS]
        threads = [threading.Thread(target=s.run) for s in made]
        for thread, one in zip(threads, made, strict=True):
            thread.start()
            while one.plan is None and thread.is_alive():
                time.sleep(0.01)
        if session.asking:
            assert session.asking.wait(120)
            session.settle(session.asking.read()[0])
        for _ in server.rounds(ROUNDS):
            pass
        server.close()
        for thread in threads:
            thread.join()
        tests = [one.data.test[:] for one in made]
        for one in made:
            one.close()
    x, y = (torch.cat(part) for part in zip(*tests, strict=True))
    with torch.no_grad():
        return float(((server.model(x).flatten() > 0) == (y.flatten() > 0.5)).double().mean())


def site(data: Path, state: str, name: str, port: int, scaling: dict[str, Any]) -> SiteConfig:
    """A hospital, with its file."""
    table = Csv(str(data / f"processed.{name}.data"), **(AS_DOWNLOADED | scaling))
    return SiteConfig(
        server=f"127.0.0.1:{port}",
        name=name,
        insecure=True,
        dataset=table,
        state=f"{state}/{name}",
        models=["logistic"],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
