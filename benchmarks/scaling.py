"""How speed and memory grow with the clients of a round and with the size of the model.

    python -m benchmarks.scaling --plot docs/images/scaling.png --json scaling.json

Digits, 60 examples a client, the 2NN (hidden layers of 200) unless its width is what grows; each point a
process of its own with one thread. Ends with status 1 where memory grows with the rounds or passes its
bound.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contestants import missing
from benchmarks.rounds import begun
from benchmarks.side import ONE_THREAD
from benchmarks.workloads import Workload

COHORTS = {10: 100, 100: 20, 1_000: 4, 10_000: 1}
"""Clients of a round -> rounds that are timed."""
WIDTHS = {50: 200, 100: 100, 200: 50, 500: 20, 1_000: 8}
"""Width of the hidden layers -> rounds that are timed, ten clients each."""
NAMES = {"bare": "bare PyTorch loop", "fedtorch": "fedtorch", "bf16": "fedtorch, bf16"}

PLAIN = argparse.Namespace(mnist="digits", seeds=None, noise=0.0, turns=None)
"""What ``benchmarks.rounds`` is told beside."""

BOUND = 1_024
"""MiB that 10,000 clients may take in all: 147 their examples, 220 torch and Python."""
GROWTH = 8
"""MiB that as many rounds again may add: what the allocator keeps, and no more."""


def points(reps: int, small: bool) -> list[dict[str, Any]]:
    """Rounds per second and peak memory at every point."""
    cohorts = [(k, None, r) for k, r in COHORTS.items() if not small or k <= 100]
    widths = [(10, w, r) for w, r in WIDTHS.items() if not small or w <= 100]
    names = [n for n in NAMES if not missing(n)]
    found = []
    for clients, width, rounds in cohorts + widths:
        work = Workload("scaling", "mlp", clients, rounds, hidden=width, eval_every=1 << 30)
        runs: dict[str, list[dict[str, Any]]] = {n: [] for n in names}
        for rep in range(reps):
            for name in names:
                side = begun(name, work, PLAIN, rep)
                side.end()
                runs[name].append(json.loads(side.first))
        for name, own in runs.items():
            middle = {
                k: statistics.median(r[k] for r in own)
                for k in ("rounds_per_second", "rounds_per_cpu_second", "peak_mib", "loss")
            }
            base = [r["rounds_per_cpu_second"] for r in runs["bare"]]
            over = [a["rounds_per_cpu_second"] / b for a, b in zip(own, base, strict=True)]
            found.append(
                {"who": name, "clients": clients, "width": width or 200}
                | {
                    "grows": "width" if width else "clients",
                    "over_bare_cpu": statistics.median(over),
                }
                | middle
            )
            print(found[-1], flush=True)
    return found


def memory(clients: int, rounds: int) -> dict[str, float]:
    """Resident memory of fedtorch after rounds with every client, in this process."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.ours import Ours
    from benchmarks.workloads import problem

    work = Workload("memory", "mlp", clients, rounds)
    ours = Ours(problem(work, Path("digits")))
    out = {}
    for r in range(1, 2 * rounds + 1):
        ours.round()
        if r in (1, rounds, 2 * rounds):
            gc.collect()
            out[f"round {r}"] = resident()
    out["peak"] = float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return out


def resident() -> float:
    """MiB of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def apart(clients: int, rounds: int) -> dict[str, float]:
    """``memory`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--memory", str(clients), str(rounds)]
    done = subprocess.run(
        command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Rounds per second of processor time and peak memory, against cohort and width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name in dict.fromkeys(p["who"] for p in found):
        own = [p for p in found if p["who"] == name]
        cohort = [p for p in own if p["grows"] == "clients"]
        width = [p for p in own if p["grows"] == "width"]
        style = {"marker": "o", "markersize": 4, "label": NAMES[name]}
        for axes, ps, x, y in (
            (left, cohort, "clients", "rounds_per_cpu_second"),
            (middle, width, "width", "rounds_per_cpu_second"),
            (right, cohort, "clients", "peak_mib"),
        ):
            axes.plot([p[x] for p in ps], [p[y] for p in ps], **style)
    rate = "rounds / s of processor time"
    left.set(xlabel="clients in a round", ylabel=rate, xscale="log", yscale="log")
    middle.set(xlabel="width of the hidden layers", ylabel=rate, xscale="log", yscale="log")
    right.set(xlabel="clients in a round", ylabel="peak memory, MiB", xscale="log")
    middle.set_xticks(list(WIDTHS), [str(w) for w in WIDTHS])
    for axes in (left, right):
        axes.set_xticks(list(COHORTS), [f"{k:,}" for k in COHORTS])
    for axes in (left, middle, right):
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    right.set_ylim(bottom=0)
    left.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, draw, and judge the memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a try of a minute")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--memory", nargs=2, type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory:
        print(json.dumps(memory(*asked.memory)))
        return 0
    clients, rounds = (100, 2) if asked.small else (10_000, 5)
    kept = apart(clients, rounds)
    print(f"{clients} clients, MiB: {kept}", flush=True)
    grown = kept[f"round {2 * rounds}"] - kept[f"round {rounds}"]
    found = points(asked.reps, asked.small)
    if asked.plot:
        plot(found, asked.plot)
    if asked.json:
        asked.json.write_text(json.dumps({"points": found, "memory": kept}, indent=2))
    wrong = [f"{rounds} rounds added {grown:.1f} MiB"] * (grown > GROWTH)
    wrong += [f"the peak of {kept['peak']:.0f} MiB is above {BOUND}"] * (kept["peak"] > BOUND)
    print(*wrong or [f"memory is flat: {rounds} more rounds added {grown:.1f} MiB"], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
