"""What a frozen base costs in a round: ``python -m benchmarks.frozen [all|head]``.

A base of 45 MB, with random weights that each site builds otherwise than the server, and a head of 8 kB.
Two clients of few examples take one step each, on two worker processes or site processes. The same model
is trained as a whole, which sends everything, and with its base frozen, which sends the head; the base goes
to each site once. Bytes are a round's figures and, of sites, those of the messages as well.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import NAMES, joined, timed
from fedtorch import Client, Local, Recipe, Server
from fedtorch.data.base import facts_of
from fedtorch.engines import Processes
from fedtorch.run import zoo
from fedtorch.sites import keys, offer
from fedtorch.sites.engine import Sites, remotes

FACTS = facts_of((784,), 10, "classification")
MODEL = """
from torch import nn
def build(in_features: int, num_outputs: int, frozen: bool = True) -> nn.Module:
    base = nn.Sequential(
        nn.Linear(in_features, 2900), nn.ReLU(), nn.Linear(2900, 2900), nn.ReLU(), nn.Linear(2900, 200)
    )
    return nn.Sequential(base.requires_grad_(not frozen), nn.ReLU(), nn.Linear(200, num_outputs))
"""


def main() -> None:
    """Each engine with the whole model, and with the head."""
    asked = sys.argv[1:] or ["all", "head"]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        Path("models").mkdir()
        Path("models/backbone.py").write_text(MODEL)
        for frozen in (what == "head" for what in asked):
            for engine in ("local", "processes", "sites"):
                said = sites(frozen) if engine == "sites" else here(engine, frozen)
                print(f"{'head' if frozen else 'all '} {engine:9}: {said}", flush=True)
        os.chdir("/")


def here(engine: str, frozen: bool) -> str:
    """Clients in this process or in workers."""
    model = zoo.build("backbone", FACTS, {"frozen": frozen})
    clients = [Client(n, (torch.randn(4, 784), torch.arange(4))) for n in NAMES]
    made = Local(chunk=1) if engine == "local" else Processes(workers=2, chunk=1)
    server = Server(model, clients, Recipe(lr=0.1, batch_size=None), engine=made)
    said = rounds(server)
    server.close()
    return said


def sites(frozen: bool) -> str:
    """Clients at sites, over TLS on loopback; the second time they are started they have the base."""
    folder, said = Path(f"sites {frozen}").absolute(), []
    keys.make(folder, ["127.0.0.1"], NAMES, 2)
    for _ in range(2 if frozen else 1):
        given = {"frozen": frozen}
        plan = offer.Plan("bench", "backbone", given, FACTS, batch_size=None, rounds=99)
        torch.manual_seed(0)
        model, recipe = plan.build()
        made = Sites(
            plan=plan, address="127.0.0.1:0", keys=folder / "server", minimum=2, deadline=90.0
        )
        server = Server(model, remotes(NAMES), recipe, engine=made)
        session: Any = server.session
        with joined(server, folder):
            server.round()
            first = sum(v.sent for v in session.last)
            said.append(f"{rounds(server)}; messages {first:,} B down in round 1")
            told = sum(v.sent for v in session.last), sum(v.received for v in session.last)
            said[-1] += f", then {told[0]:,} down, {told[1]:,} up"
    return "\n    started again: ".join(said)


def rounds(server: Server, many: int = 8) -> str:
    """Bytes of a round, and the median of its seconds."""
    seconds = statistics.median(timed(server, many - 1))
    figures = server.round()
    bytes_ = f"{figures['bytes_down']:,} B down, {figures['bytes_up']:,} B up"
    return f"round {seconds * 1e3:.0f} ms, {bytes_}"


if __name__ == "__main__":
    main()
