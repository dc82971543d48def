"""Rounds per second of fedtorch, of a bare PyTorch loop and of whatever else is installed.

    python -m benchmarks.rounds --workloads w1 w2 w3 w4 w5 --reps 5 --json out.json
    python -m benchmarks.rounds --seeds 5        # other data, weights, order and noise each time
    python -m benchmarks.rounds --workloads w7 w7-private --turns 8       # networks that people train

Each measurement is a process of its own with one thread; repetitions go contestant by contestant
(A B C A B C ...), so that a neighbour's load falls on all of them. With ``--turns`` all are up at once
and take turns round by round, which is for rounds of a second. A ratio is the median of the ratios
to the bare loop of the same repetition, once by the clock and once by processor time. It ends with
status 1 where a contestant's result differs from the baseline's beyond what noise explains, or rounding:
as far as the bare loop is from itself ("nudged") where its first weights differ by that.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import agreement
from benchmarks.contestants import BASELINE, CONTESTANTS, NUDGED, missing, once, turns
from benchmarks.machine import machine
from benchmarks.side import ANSWER, Side
from benchmarks.workloads import WORKLOADS, Workload


def begun(name: str, work: Workload, options: argparse.Namespace, rep: int = 0) -> Side:
    """A contestant in a process of its own."""
    order = {
        "name": name,
        "work": asdict(work),
        "mnist": options.mnist,
        "seed": rep if options.seeds else 0,
        "noise": options.noise,
        "draw": rep,
        "turns": bool(options.turns),
        "born": time.time(),
    }
    return Side(Path.cwd(), "-m", "benchmarks.rounds", "--worker", json.dumps(order))


def measure(names: list[str], work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved repetitions -> runs of each contestant."""
    runs: dict[str, Any] = {n: [] for n in names}
    for rep in range(options.seeds or options.reps):
        for name in names:
            side = begun(name, work, options, rep)
            side.end()
            found = json.loads(side.first)
            runs[name].append(found)
            print(
                f"{work.name} {rep + 1} {name}: {found['rounds_per_second']:.2f}/s, "
                f"accuracy {found['accuracy']:.4f}",
                flush=True,
            )
    return runs


def in_turns(names: list[str], work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Runs of a single round each, of contestants that are all up."""
    work = replace(work, rounds=options.turns)
    sides = {n: begun(n, work, options) for n in names}
    times: dict[str, Any] = {n: [] for n in names}
    second: dict[str, Any] = {n: {} for n in names}
    for turn in range(options.turns):
        for n, side in sides.items():
            times[n].append(json.loads(side.ask("round")))
            if turn == 0 and work.privacy != "sample":
                second[n] = {"second_loss": json.loads(side.ask("score"))["loss"]}
    out: dict[str, Any] = {}
    for n, side in sides.items():
        known = json.loads(side.first) | second[n] | json.loads(side.ask("score"))
        out[n] = [known | t for t in times[n]]
        side.end()
    return out


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Medians of each contestant, and ratios to the baseline of the same repetition."""
    out: dict[str, Any] = {}
    for name, own in runs.items():
        out[name] = {k: middle([r[k] for r in own]) for k in own[0]}
        scores = [r["accuracy"] for r in own]
        out[name]["accuracy_mean"] = statistics.mean(scores)
        out[name]["accuracy_sd"] = statistics.stdev(scores) if len(scores) > 1 else 0.0
        for kind, mark in (("second", ""), ("cpu_second", "_cpu")):
            key = f"rounds_per_{kind}"
            pairs = [(a[key], b[key]) for a, b in zip(own, runs[BASELINE], strict=True)]
            ratios = [a / b if a else None for a, b in pairs]
            out[f"{name}_over_{BASELINE}{mark}"] = middle(ratios)
    if out.get("fedtorch", {}).get("path") == "fast":
        for mark in ("", "_cpu"):
            out[f"fast_over_{BASELINE}{mark}"] = out[f"fedtorch_over_{BASELINE}{mark}"]
    return out


def middle(values: list[Any]) -> Any:
    """The median of numbers; of words, the first."""
    return statistics.median(values) if isinstance(values[0], (int, float)) else values[0]


def table(results: dict[str, Any]) -> str:
    """A line for each contestant, in Markdown."""
    lines = [
        "| workload | who | rounds/s | x bare (clock) | x bare (cpu) | peak MiB | start s "
        "| accuracy (sd) | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for workload, figures in results.items():
        for name, f in figures.items():
            if isinstance(f, dict):
                ratios = [figures[f"{name}_over_{BASELINE}{c}"] for c in ("", "_cpu")]
                clock, cpu = (f"{r:.2f}" if r else "" for r in ratios)
                path = f" ({f['path']})" if f["path"] else ""
                lines.append(
                    f"| {workload} | {name}{path} | {f['rounds_per_second']:.2f} | {clock} "
                    f"| {cpu} | {f['peak_mib']:.0f} | {f['seconds_to_first_round']:.1f} "
                    f"| {f['accuracy_mean']:.4f} ({f['accuracy_sd']:.4f}) | {f['loss']:.5f} |"
                )
    return "\n".join(lines)


def present(workload: str, only: list[str]) -> list[str]:
    """Contestants that can do this workload here; the baseline and what judges by it always are."""
    names = []
    for name, contestant in CONTESTANTS.items():
        asked = name in (BASELINE, NUDGED, *only)
        if not asked or workload not in contestant.workloads:
            continue
        if why := missing(name):
            print(f"{workload}: without {name}: {why}")
        else:
            names.append(name)
    return names


def options() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--mnist", default="../shared/data/mnist", help="folder of IDX files")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--turns", type=int, help="rounds in turn, all contestants being up")
    parser.add_argument("--seeds", type=int, help="repetitions with seeds 0, 1, ...")
    parser.add_argument(
        "--noise", type=float, default=1.0, help="multiplier; 1e-6: none to speak of"
    )
    parser.add_argument("--epochs", type=int, default=1, help="local passes a round (w1, w2, w4)")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    fixed = [w for w in asked.workloads if WORKLOADS[w].privacy == "sample"]
    if asked.epochs != 1 and fixed:
        parser.error(
            f"--epochs: {fixed[0]} takes private steps, not passes; choose --workloads w1 w2 w4"
        )
    return asked


def main() -> int:
    """Measure what was asked for, or do the one measurement a parent asked for."""
    asked = options()
    if asked.worker:
        order = json.loads(asked.worker)
        if order["turns"]:
            turns(order)
        else:
            print(f"{ANSWER}{json.dumps(once(order))}", flush=True)
        return 0
    print(machine())
    results, wrong = {}, []
    for workload in asked.workloads:
        work, who = replace(WORKLOADS[workload], epochs=asked.epochs), present(workload, asked.only)
        runs = in_turns(who, work, asked) if asked.turns else measure(who, work, asked)
        results[workload] = summary(runs)
        results_of_one = {n: own[:1] if asked.turns else own for n, own in runs.items()}
        wrong += agreement.complaints(results_of_one, work, asked.noise)
    print(f"\n{table(results)}")
    if asked.json:
        with open(asked.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    print(*wrong or ["every result agrees with its reference"], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
