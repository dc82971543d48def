"""Rounds of this checkout against an older one's, in bursts of a fraction of a second that take turns.

    git worktree add ../before ffe1130
    python -m benchmarks.against ../before --workloads w1 w4 w3 --names fedtorch general

Neighbours change a machine's speed by a half within seconds, so that whole runs one after the other show
nothing. Here both sides are up at once, each in a process of its own with one thread, and take turns.
After a dozen pairs both start anew: where memory lies is worth a few hundredths. Printed is the median of
the pairs' ratios of processor time, with quartiles; above 1 this checkout is the faster one. The folder of
this checkout itself shows the noise.
"""

import argparse
import statistics
from itertools import count
from pathlib import Path

from benchmarks.side import Side
from benchmarks.workloads import MNIST, WORKLOADS

HERE = Path(__file__).parents[1]
DOZEN = 12
WORKER = """
import sys, time, torch
from dataclasses import replace
from pathlib import Path
from benchmarks.contestants import make
from benchmarks.workloads import WORKLOADS, problem
torch.set_num_threads(1)
torch.manual_seed(0)
work, name, mnist = sys.argv[1], sys.argv[2], Path(sys.argv[3])
made = problem(replace(WORKLOADS[work], rounds=5000), mnist, 0, 1.0)
contestant = make(name, made, mnist)
contestant.round()
contestant.round()
print("answer", 0, flush=True)
for line in sys.stdin:
    start = time.process_time()
    for _ in range(int(line)):
        contestant.round()
    print("answer", time.process_time() - start, flush=True)
"""


def pairs(older: Path, about: tuple[str, ...], many: int, burst: float) -> list[float]:
    """Ratios older over this one's time, of bursts of about so many seconds."""
    found: list[float] = []
    while len(found) < many:
        sides = [Side(folder, "-c", WORKER, *about) for folder in (older, HERE)]
        size = next(n for k in count() if float(sides[0].ask(n := 2**k)) > burst / 2)
        for k in range(DOZEN):
            first, second = (float(sides[n].ask(size)) for n in ((0, 1) if k % 2 else (1, 0)))
            found.append(first / second if k % 2 else second / first)
        for side in sides:
            side.end()
    return found


def main() -> None:
    """A row for each workload and way of training."""
    asks = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    asks.add_argument("older", type=Path, help="another checkout's folder")
    asks.add_argument("--workloads", nargs="+", default=["w1", "w4", "w3"], choices=WORKLOADS)
    asks.add_argument("--names", nargs="+", default=["fedtorch", "general"], help="contestants")
    asks.add_argument("--pairs", type=int, default=60)
    asks.add_argument("--burst", type=float, default=0.3, help="seconds")
    asks.add_argument("--mnist", type=Path, default=MNIST)
    asked = asks.parse_args()
    print("| workload | who | this over the older, median | quartiles |\n|---|---|---|---|")
    for work in asked.workloads:
        for name in asked.names:
            about = work, name, str(asked.mnist.resolve())
            found = pairs(asked.older.resolve(), about, asked.pairs, asked.burst)
            low, middle, high = statistics.quantiles(found)
            print(f"| {work} | {name} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
