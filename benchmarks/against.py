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
import os
import statistics
import subprocess
import sys
from itertools import count
from pathlib import Path

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
print("seconds", 0, flush=True)
for line in sys.stdin:
    start = time.process_time()
    for _ in range(int(line)):
        contestant.round()
    print("seconds", time.process_time() - start, flush=True)
"""


class Side:
    """One checkout's process, after its first two rounds."""

    def __init__(self, folder: Path, *about: str) -> None:
        """``about``: the worker's arguments."""
        given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, *about],
            cwd=folder, env=os.environ | given, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.answer()

    def answer(self) -> float:
        """Seconds; raises SystemExit where the process has ended."""
        for line in self.process.stdout or ():
            word, _, number = line.partition(" ")
            if word == "seconds":
                return float(number)
        raise SystemExit(f"{self.process.args[-3:]} ended: status {self.process.wait()}")  # type: ignore[index]

    def rounds(self, many: int) -> float:
        """Processor seconds of so many."""
        print(many, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        """Nothing is asked any more."""
        self.process.communicate()


def pairs(older: Path, about: tuple[str, ...], many: int, burst: float) -> list[float]:
    """Ratios older over this one's time, of bursts of about so many seconds."""
    found: list[float] = []
    while len(found) < many:
        sides = [Side(folder, *about) for folder in (older, HERE)]
        size = next(n for k in count() if sides[0].rounds(n := 2**k) > burst / 2)
        for k in range(DOZEN):
            first, second = (sides[n].rounds(size) for n in ((0, 1) if k % 2 else (1, 0)))
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
