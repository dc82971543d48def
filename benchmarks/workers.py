"""Rounds of worker processes over those of one process, and how far this machine lets them go.

    python -m benchmarks.workers --workloads w4 w2 w7

One process, a process with two workers, and one more process like the first are up at once and take turns.
In the last turn both processes of the first kind work beside each other, each for itself: what they do
together, over what one does alone, is the most that this machine gives two workers, which share memory,
caches, clock and whoever else is there. What the workers reach of that carries over to other machines.
Medians of the turns, with quartiles. Where others use the machine, the processor's time says what the clock
cannot: that of the first process and of each round's slowest worker, as if one came after the other.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.ours import Ours
from benchmarks.side import ANSWER, Side
from benchmarks.workloads import MNIST, WORKLOADS, problem
from fedtorch.engines import Local, Processes, pages

RATIOS = "ratio", "most", "near"

ROUNDS = 5000
"""Planned, for the noise; far fewer are trained."""


def worker(workload: str, workers: int, mnist: Path) -> None:
    """One side: rounds for as many seconds as it is told; 0 workers: in this process."""
    torch.set_num_threads(1)
    pages.keep()
    work = replace(WORKLOADS[workload], rounds=ROUNDS)
    ours = Ours(problem(work, mnist), engine=Processes(workers=workers) if workers else Local())
    others = [w.process.pid for w in getattr(ours.server.session, "workers", [])]
    for _ in range(2):
        ours.round()
    print(f"{ANSWER}{len(others)}", flush=True)
    for seconds in sys.stdin:
        print(f"{ANSWER}{json.dumps(burst(ours, others, float(seconds)))}", flush=True)
    ours.server.close()


def burst(ours: Ours, others: Sequence[int], seconds: float) -> dict[str, float]:
    """Means of a round, in seconds: by the clock, of this process, and of the slowest of others."""
    start, rounds, first, slowest = time.perf_counter(), 0, 0.0, 0.0
    while time.perf_counter() - start < seconds:
        before, own = [*map(used, others)], time.process_time()
        ours.round()
        first += time.process_time() - own
        slowest += max((used(p) - b for p, b in zip(others, before, strict=True)), default=0.0)
        rounds += 1
    clock = time.perf_counter() - start
    return {"clock": clock / rounds, "first": first / rounds, "slowest": slowest / rounds}


def used(process: int) -> float:
    """Seconds of the processor that a process has had."""
    return time.clock_gettime((~process << 3) | 2)  # as Linux numbers its clocks


def turn(alone: Sequence[Side], shared: Side, seconds: float, first: int) -> list[dict[str, float]]:
    """One process, workers, and all processes at once: by the clock and by the processor's time."""
    one = json.loads(alone[first].ask(seconds))
    two = json.loads(shared.ask(seconds))
    for side in alone:
        side.tell(seconds)
    beside = [json.loads(side.answer()) for side in alone]
    critical = two["first"] + two["slowest"]
    by_clock = compared(one["clock"], two["clock"], [b["clock"] for b in beside])
    by_processor = compared(one["first"], critical, [b["first"] for b in beside])
    return [by_clock, by_processor | {"first": two["first"], "slowest": two["slowest"]}]


def compared(one: float, two: float, beside: Sequence[float]) -> dict[str, float]:
    """Seconds of a round and what follows of them."""
    most = sum(one / b for b in beside)
    return {"one": one, "two": two, "ratio": one / two, "most": most, "near": one / two / most}


def measure(workload: str, asked: argparse.Namespace) -> list[str]:
    """The rows of a workload."""
    about = "-m", "benchmarks.workers", "--mnist", str(asked.mnist), "--worker", workload
    alone = [Side(Path.cwd(), *about, "0") for _ in range(asked.workers)]
    shared = Side(Path.cwd(), *about, str(asked.workers))
    if not int(shared.first):
        rows = [f"| {workload} | stays in one process, by rule | | | | | |"]
    else:
        turns = [turn(alone, shared, asked.burst, k % len(alone)) for k in range(asked.turns)]
        kinds = zip(("clock", "processor"), zip(*turns, strict=True), strict=True)
        rows = [row(f"{workload} | {kind}", figures) for kind, figures in kinds]
    for side in (*alone, shared):
        side.end()
    return rows


def row(name: str, turns: Sequence[dict[str, float]]) -> str:
    """Medians, and quartiles where they are ratios."""
    found = {k: statistics.quantiles([t[k] for t in turns]) for k in turns[0]}
    ms = {k: f"{1e3 * v[1]:.3g}" for k, v in found.items()}
    ratios = [f"{v[1]:.2f} ({v[0]:.2f} to {v[2]:.2f})" for v in map(found.get, RATIOS) if v]
    two = f"{ms['first']} + {ms['slowest']}" if "first" in ms else ms["two"]
    return " | ".join([f"| {name}", f"{ms['one']} ms", f"{two} ms", *ratios]) + " |"


def main() -> None:
    """A row for each workload."""
    asks = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    asks.add_argument("--workloads", nargs="+", default=["w4", "w2", "w7"], choices=WORKLOADS)
    asks.add_argument("--workers", type=int, default=2)
    asks.add_argument("--turns", type=int, default=12)
    asks.add_argument("--burst", type=float, default=1.0, help="seconds")
    asks.add_argument("--mnist", type=Path, default=MNIST)
    asks.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = asks.parse_args()
    if asked.worker:
        worker(asked.worker[0], int(asked.worker[1]), asked.mnist)
        return
    print(machine())
    print(
        f"| workload | by | one process | {asked.workers} workers | over one | machine's most | of that |"
        "\n|---|---|---|---|---|---|---|"
    )
    for workload in asked.workloads:
        print(*measure(workload, asked), sep="\n", flush=True)


if __name__ == "__main__":
    main()
