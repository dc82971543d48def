"""The general path against the bare loop, round by round in one process.

    python -m benchmarks.general --workloads w1 w2 w4 --rounds 40

On a machine that others use too, a neighbour's load lasts longer than a round: the two take turns, and
what is compared is the processor time of rounds that follow each other. ``benchmarks.rounds`` gives each
contestant a process of its own, which needs an idle machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.bare import Bare
from benchmarks.ours import Ours
from benchmarks.workloads import WORKLOADS, problem
from fedtorch import Local


def seconds(round: Callable[[], None]) -> float:
    """Processor time of one round."""
    start = time.process_time()
    round()
    return time.process_time() - start


def compare(workload: str, rounds: int, mnist: Path) -> str:
    """A line of the table: medians, the median and quartiles of the ratios, and both at their fastest."""
    both = problem(replace(WORKLOADS[workload], rounds=rounds), mnist)
    bare, general = Bare(both), Ours(both, engine=Local(solver="general"))
    bare.round(), general.round()
    pairs = [(seconds(bare.round), seconds(general.round)) for _ in range(rounds)]
    theirs, ours = (sorted(column) for column in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    columns = (
        workload,
        f"{statistics.median(theirs) * 1e3:.1f}",
        f"{statistics.median(ours) * 1e3:.1f}",
        f"{middle:.3f} ({low:.3f} to {high:.3f})",
        f"{theirs[0] / ours[0]:.3f}",
    )
    return f"| {' | '.join(columns)} |"


def main() -> None:
    """Compare on each workload."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", default=["w1", "w2", "w4"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--mnist", default="../shared/data/mnist", help="folder of IDX files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| workload | bare, ms | general, ms | bare / general (quartiles) | fastest rounds |")
    print("|---|---|---|---|---|")
    for workload in options.workloads:
        print(compare(workload, options.rounds, Path(options.mnist)), flush=True)


if __name__ == "__main__":
    main()
