"""Rounds per second of fedtorch, of a bare PyTorch loop and of whatever else is installed.

    python -m benchmarks.rounds --workloads w1 w2 w3 w4 --reps 5 --json out.json

Each measurement is a process of its own with one thread; repetitions go contestant by contestant
(A B C A B C ...), so that a neighbour's load falls on all of them. A ratio is the median of the ratios
to the bare loop of the same repetition, once by the clock and once by processor time.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONTESTANTS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "bare": (("w1", "w2", "w3", "w4"), None),
    "general": (("w1", "w2", "w3", "w4"), None),
    "fast": (("w1", "w3", "w4"), None),
}
"""Name -> the workloads it can do, and the module it needs installed."""

BASELINE = "bare"


def make(name: str, problem: Any) -> Any:
    """The contestant, ready for its first round."""
    from benchmarks import bare, ours

    if name == "bare":
        return bare.Bare(problem)
    return ours.Ours(problem, name)


def worker(name: str, workload: str, mnist: Path, born: float) -> dict[str, float]:
    """One measurement: a warm-up round, then the workload's rounds with their evaluations."""
    start = time.time()
    import torch

    torch.set_num_threads(1)
    from benchmarks.workloads import WORKLOADS, problem

    work = WORKLOADS[workload]
    contestant = make(name, problem(work, mnist))
    imported = time.time() - start
    contestant.round()
    ready = time.time() - born
    cpu, clock = time.process_time(), time.perf_counter()
    for r in range(1, work.rounds + 1):
        contestant.round()
        if r % work.eval_every == 0:
            accuracy, loss = contestant.evaluate()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {
        "rounds_per_second": work.rounds / clock,
        "rounds_per_cpu_second": work.rounds / cpu,
        "seconds_import": imported,
        "seconds_to_first_round": ready,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "accuracy": accuracy,
        "loss": loss,
    }


def measure(names: list[str], workload: str, mnist: str, reps: int) -> dict[str, Any]:
    """Interleaved repetitions -> figures and ratios for each contestant."""
    runs: dict[str, list[dict[str, float]]] = {n: [] for n in names}
    for rep in range(reps):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.rounds", "--worker", name, workload, mnist]
            env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, str(time.time())], env=env, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{name} failed on {workload}:\n{done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{workload} {rep + 1}/{reps} {name}: {runs[name][-1]['rounds_per_second']:.2f}/s"
            )
    out: dict[str, Any] = {}
    for name in names:
        out[name] = {k: statistics.median(r[k] for r in runs[name]) for k in runs[name][0]}
        for kind in ("second", "cpu_second"):
            key = f"rounds_per_{kind}"
            ratios = [a[key] / b[key] for a, b in zip(runs[name], runs[BASELINE], strict=True)]
            out[f"{name}_over_{BASELINE}" + ("_cpu" if "cpu" in kind else "")] = statistics.median(
                ratios
            )
    return out


def table(results: dict[str, Any]) -> str:
    """A line for each contestant, in Markdown."""
    lines = [
        "| workload | path | rounds/s | x bare (clock) | x bare (cpu) | peak MiB | start s "
        "| accuracy | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for workload, figures in results.items():
        for name, f in figures.items():
            if isinstance(f, dict):
                ratios = [figures[f"{name}_over_{BASELINE}{c}"] for c in ("", "_cpu")]
                lines.append(
                    f"| {workload} | {name} | {f['rounds_per_second']:.2f} | {ratios[0]:.2f} "
                    f"| {ratios[1]:.2f} | {f['peak_mib']:.0f} | {f['seconds_to_first_round']:.1f} "
                    f"| {f['accuracy']:.4f} | {f['loss']:.5f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for, or do the one measurement a parent asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", default=["w1", "w2", "w3", "w4"])
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), help="contestants to run")
    parser.add_argument("--mnist", default="../shared/data/mnist", help="folder of IDX files")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, workload, mnist, born = options.worker
        print(json.dumps(worker(name, workload, Path(mnist), float(born))))
        return
    results: dict[str, Any] = {}
    for workload in options.workloads:
        names = []
        for name, (can, needs) in CONTESTANTS.items():
            if (name != BASELINE and name not in options.only) or workload not in can:
                continue
            if needs and importlib.util.find_spec(needs) is None:
                print(f"{name}: {needs} is not installed (pip install 'fedtorch[bench]')")
                continue
            names.append(name)
        results[workload] = measure(names, workload, options.mnist, options.reps)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread\n")
    print(table(results))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
