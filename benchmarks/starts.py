"""Whole processes over ``import torch`` alone: a script of one private round, and train.py without options.

python -m benchmarks.starts [TURNS]: all three in turn, and medians of their ratios to torch
"""

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.side import ONE_THREAD

ROOT = Path(__file__).parent.parent

FIRST = """
import torch
from fedtorch import Client, Recipe, Server
from fedtorch.privacy import SampleLevel

x = torch.randn(1000, 64)
y = (x.sum(1) > 0).long()
layers = torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10)
clients = [Client(f"hospital {k}", (x[k::10], y[k::10])) for k in range(10)]
plan = SampleLevel(epsilon=3.0, rounds=10, sample_rate=0.1, steps=10, batch_size=10)
next(Server(torch.nn.Sequential(*layers), clients, Recipe(privacy=plan)).rounds(10))
"""

STARTS = {
    "import torch": ["-c", "import torch"],
    "a script's first private round": ["-c", FIRST],
    "train.py": [str(ROOT / "train.py")],
}


def took(arguments: list[str]) -> tuple[float, float]:
    """Seconds of one process, from start to exit: (clock, processor)."""
    env = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    with TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments], env=env, cwd=folder, capture_output=True, check=True
        )
        clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return clock, spent


def main() -> int:
    """Print seconds and ratios, clock and processor."""
    many = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    for arguments in STARTS.values():  # loops are compiled once, and files come into memory
        took(arguments)
    turns = [[took(arguments) for arguments in STARTS.values()] for _ in range(many)]
    for k, name in enumerate(STARTS):
        for which, by in enumerate(("clock", "processor")):
            seconds = statistics.median(turn[k][which] for turn in turns)
            ratios = [turn[k][which] / turn[0][which] for turn in turns]
            middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
            print(f"{name}, {by}: {seconds:.2f} s, {middle:.2f} x ({least:.2f} to {most:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
