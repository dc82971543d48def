"""Who is measured, on which workloads, and one measurement of one of them in this process."""

import importlib.util
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.side import ANSWER
from benchmarks.workloads import WORKLOADS, Workload, problem

BASELINE, NUDGED = "bare", "nudged"


class Contestant(NamedTuple):
    """What a name stands for."""

    workloads: tuple[str, ...]
    needs: str | None = None
    """Module that must be installed."""
    coarse: float = 1.0
    """How much coarser its arithmetic is than float32, as a factor on what rounding explains."""
    alone: bool = True
    """All its work is done in the measured process, so that processor time means something."""


ALL = tuple(WORKLOADS)
PLAIN = tuple(n for n, w in WORKLOADS.items() if w.privacy == "none")
PRIVATE = tuple(n for n, w in WORKLOADS.items() if w.privacy == "sample")

CONTESTANTS = {
    BASELINE: Contestant(ALL),
    NUDGED: Contestant(PLAIN),
    "fedtorch": Contestant(ALL),
    "general": Contestant(ALL),
    "bf16": Contestant(("w1", "w2", "w4", "w7"), coarse=20.0),
    "projected": Contestant(("w3",)),
    "pfl": Contestant(("w1", "w2", "w4"), "pfl"),
    "jax": Contestant(("w1", "w2", "w3", "w4", "w5"), "jax"),
    "opacus": Contestant(PRIVATE, "opacus"),
    "opacus-ghost": Contestant(PRIVATE, "opacus"),
    "flower": Contestant(("w1", "w2", "w4"), "flwr", alone=False),
}
"""nudged: the bare loop from first weights that differ by rounding; fedtorch: what ``auto`` picks; general:
the path that takes any model; bf16 and projected: options of the fast path; the rest are peers."""


def missing(name: str) -> str | None:
    """Why this contestant cannot run here, if it cannot."""
    needs = CONTESTANTS[name].needs
    if needs and importlib.util.find_spec(needs) is None:
        return f"{needs} is not installed (see benchmarks/RESULTS.md, Peers)"
    return None


def make(name: str, problem: Any, mnist: Path) -> Any:
    """The contestant, ready for its first round. Imports only what it needs."""
    match name:
        case "fedtorch" | "general" | "bf16" | "projected":
            from benchmarks.ours import Ours
            from fedtorch import Local

            solver = "general" if name == "general" else "auto"
            dtype = "bf16" if name == "bf16" else "float32"
            made = Local(solver=solver, dtype=dtype)
            return Ours(problem, projected=name == "projected", engine=made)
        case "pfl":
            from benchmarks.peer_pfl import Pfl

            return Pfl(problem)
        case "jax":
            from benchmarks.peer_jax import Jax

            return Jax(problem)
        case "opacus" | "opacus-ghost":
            from benchmarks import peer_opacus

            return (peer_opacus.hooks if name == "opacus" else peer_opacus.ghost)(problem)
        case "flower":
            from benchmarks.peer_flower import Flower

            return Flower(problem, mnist)
    from benchmarks.bare import Bare, nudged

    return nudged(problem) if name == NUDGED else Bare(problem)


def started(order: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The contestant after its warm-up round, and what is known of it by then."""
    torch.set_num_threads(1)
    start = time.time()
    work, mnist = Workload(**order["work"]), Path(order["mnist"])
    made = problem(work, mnist, order["seed"], order["noise"])
    torch.manual_seed(order["draw"])  # the noise of those that draw it from torch
    contestant = make(order["name"], made, mnist)
    prepared = time.time() - start
    contestant.round()
    ready = time.time() - order["born"]
    return contestant, {
        "seconds_prepare": prepared,
        "seconds_to_first_round": ready,
        "first_loss": contestant.evaluate()[1],
        "path": getattr(contestant, "path", None),
    }


def once(order: dict[str, Any]) -> dict[str, Any]:
    """One measurement: a warm-up round, then the workload's rounds with their evaluations."""
    contestant, found = started(order)
    work, alone = Workload(**order["work"]), CONTESTANTS[order["name"]].alone
    clock = cpu = 0.0
    for r in range(1, work.rounds + 1):
        began, first = time.process_time(), time.perf_counter()
        contestant.round()
        if work.eval_every and (r % work.eval_every == 0 or r == work.rounds):
            scores = contestant.evaluate()
        clock, cpu = clock + time.perf_counter() - first, cpu + time.process_time() - began
        if r == 1 and work.privacy != "sample":
            found["second_loss"] = contestant.evaluate()[1]
    accuracy, loss = scores if work.eval_every else contestant.evaluate()
    getattr(contestant, "close", lambda: None)()
    return found | {
        "rounds_per_second": work.rounds / clock,
        "rounds_per_cpu_second": work.rounds / cpu if alone else None,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "accuracy": accuracy,
        "loss": loss,
    }


def turns(order: dict[str, Any]) -> None:
    """A contestant that takes a round when asked for one, and says how fast it was."""
    contestant, found = started(order)
    print(f"{ANSWER}{json.dumps(found)}", flush=True)
    for asked in sys.stdin:
        if asked.strip() == "round":
            cpu, clock = time.process_time(), time.perf_counter()
            contestant.round()
            clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
            said = {"rounds_per_second": 1 / clock, "rounds_per_cpu_second": 1 / cpu}
        else:
            accuracy, loss = contestant.evaluate()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            said = {"accuracy": accuracy, "loss": loss, "peak_mib": peak}
        print(f"{ANSWER}{json.dumps(said)}", flush=True)
    getattr(contestant, "close", lambda: None)()
