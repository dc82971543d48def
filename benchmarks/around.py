"""What a run costs beside its training: import, start-up to the first round, dealing data, accounting.

python -m benchmarks.around
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.side import ONE_THREAD
from fedtorch.data import Dirichlet, Iid, Natural, QuantitySkew, Shards, from_tensors, partition
from fedtorch.privacy.accounting.events import Event
from fedtorch.privacy.accounting.ledger import Ledger

CNN = ["--model", "cnn"]

EXAMPLES, CLIENTS = 1_000_000, 10_000

IMPORT = """
import json, time
a, b = time.perf_counter(), time.process_time()
import torch
c, d = time.perf_counter(), time.process_time()
import fedtorch
e, f = time.perf_counter(), time.process_time()
print(json.dumps([c - a, d - b, e - c, f - d]))
"""

FIRST = """
import sys, time
sys.argv[1:] = {arguments!r}
import train
from fedtorch.run.console import Report
def first(self, metrics):
    print("first", time.time(), time.process_time(), flush=True)
    sys.exit()
Report.round = first
train.main()
"""


def imports(reps: int) -> list[float]:
    """Medians in seconds: torch (clock, processor), fedtorch on top (clock, processor)."""
    runs = [json.loads(python(IMPORT)) for _ in range(reps)]
    return [statistics.median(r) for r in zip(*runs, strict=True)]


def first_round(arguments: Sequence[str], reps: int) -> tuple[float, float]:
    """Medians in seconds from the start of the process to the end of round one (clock, processor)."""
    runs = []
    for _ in range(reps):
        with TemporaryDirectory() as folder:
            told = [*arguments, "--rounds", "1", "--run-dir", f"{folder}/run"]
            start = time.time()
            out = python(FIRST.format(arguments=told))
        _, clock, cpu = next(li for li in out.splitlines() if li.startswith("first")).split()
        runs.append((float(clock) - start, float(cpu)))
    clocks, cpus = zip(*runs, strict=True)
    return statistics.median(clocks), statistics.median(cpus)


def python(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | ONE_THREAD,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def dealing() -> dict[str, float]:
    """Processor seconds to deal a million examples to ten thousand clients, by each rule."""
    rng = np.random.default_rng(0)
    x, y = torch.zeros(EXAMPLES, 1), torch.from_numpy(rng.integers(0, 10, EXAMPLES))
    keys = [f"owner {k}" for k in rng.integers(0, CLIENTS, EXAMPLES)]
    data = from_tensors("made", (x, y), (x[:1], y[:1]), "classification", 10, keys)
    rules = (
        Iid(),
        Dirichlet(),
        Dirichlet(alpha=0.01),
        Shards(),
        QuantitySkew(),
        QuantitySkew(alpha=0.05),
    )
    out = {}
    for how in (*rules, Natural()):
        start = time.process_time()
        _, parts = partition(data, how, None if how.needs_keys else CLIENTS, 0)
        out[str(how)] = time.process_time() - start
        assert sum(map(len, parts)) == EXAMPLES and min(map(len, parts)) > 0
    return out


PRICED = (  # noise, rate, steps a round, rounds, clients, clients a round
    (1.0, 1 / 6, 6, 20, 10, 10),  # W3
    (1.0, 1 / 6, 6, 100, 10, 10),
    (1.3, 0.01, 20, 1000, 10, 10),
    (2.0, 0.1, 5, 300, 10_000, 100),
)


def accounting() -> list[tuple[float, float]]:
    """Processor milliseconds a round of the ledger and its accountant: mean and largest, of each."""
    out = []
    for noise, rate, steps, rounds, clients, cohort in PRICED:
        ledger, event, took = Ledger(), Event("gaussian", noise, rate, steps), []
        draw = random.Random(0)
        for r in range(rounds + 1):  # the first, in which modules are loaded, does not count
            names = [str(k) for k in draw.sample(range(clients), cohort)]
            start = time.process_time()
            ledger.fits(event, names, 100.0, 1e-5)
            ledger.charge(r, event, names)
            ledger.spent(1e-5)
            took.append(1000 * (time.process_time() - start))
        out.append((statistics.mean(took[1:]), max(took[1:])))
    return out


def main() -> int:
    """Print all of it; status 1 where an import or a rule takes longer than it may."""
    names = ["torch clock", "torch cpu", "fedtorch clock", "fedtorch cpu"]
    took = dict(zip(names, imports(5), strict=True))
    print("import, s:", {n: round(v, 2) for n, v in took.items()})
    plain = ["--privacy", "none"]
    late = False
    for arguments in (plain, [*plain, *CNN], [], ["--privacy", "client"], CNN):
        clock, cpu = first_round(arguments, 3)
        late |= cpu > 3 and CNN[-1] not in arguments
        print(f"first round of train.py {' '.join(arguments)}: {clock:.2f} s, cpu {cpu:.2f} s")
    dealt = dealing()
    for rule, seconds in dealt.items():
        print(f"{rule}: {seconds:.2f} s")
    for options, (mean, most) in zip(PRICED, accounting(), strict=True):
        print(f"ledger and accountant, {options}: {mean:.2f} ms a round, at most {most:.0f}")
    return int(late or took["fedtorch cpu"] > 0.3 or max(dealt.values()) > 3)


if __name__ == "__main__":
    sys.exit(main())
