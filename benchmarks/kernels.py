"""What each group of compiled loops is worth: rounds with it switched off over rounds with all, here.

    python -m benchmarks.kernels --rounds 60          # w1, w4, w3 and w3 with projected noise

A loop stays while switching it off costs a tenth on one of these on two kinds of processor. Rounds take
turns in one process, in random order, and are timed by the processor. A larger processor pretends AVX2 by
ATEN_CPU_CAPABILITY=avx2, MKL_CBWR=AVX2, ONEDNN_MAX_CPU_ISA=AVX2, NUMBA_CPU_NAME=haswell with a Haswell's
NUMBA_CPU_FEATURES ("+avx2,+fma,+bmi,..."), NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR", and
OPENSSL_ia32cap=":~0x600d0230000" for the cipher; what is used is printed.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.bare import Bare
from benchmarks.machine import machine
from benchmarks.ours import Ours
from benchmarks.workloads import MNIST, WORKLOADS, problem
from fedtorch.fast import ops, solver
from fedtorch.kernels.loops import Loops
from fedtorch.privacy.noise import normals

GROUPS = {
    "all on": (),
    "sparse": ("sparse",),
    "products": ("append", "coefficients", "outputs", "inputs", "sums", "behind", "clips"),
    "closing": ("closing",),
    "visits": ("visits", "behind", "clips"),
    "noise": ("noise",),
}
"""Which operations torch does instead; whole visits take coefficients from loops alone."""
GROUPS |= {"all off": tuple(op for group in GROUPS.values() for op in group), "bare": ()}
CASES = (("w1", False), ("w4", False), ("w3", False), ("w3", True))


@contextmanager
def without(off: tuple[str, ...]) -> Iterator[None]:
    """Torch, and NumPy for noise, in place of these loops."""
    names = {name: getattr(ops.Ops, name) for name in off if name != "noise"}
    some = type("Some", (Loops,), names)
    with ExitStack() as stack:
        stack.enter_context(patch.object(solver, "ops_for", lambda like: some()))
        if "noise" in off:
            stack.enter_context(patch.object(normals, "compiled", lambda loop, exact=False: None))
        yield


def times(work: str, projected: bool, rounds: int, mnist: Path) -> dict[str, list[float]]:
    """Seconds of each round, by group."""
    made = problem(replace(WORKLOADS[work], rounds=rounds + 3), mnist)
    private = made.work.privacy != "none"
    names = [n for n in GROUPS if private or n != "noise"]
    who: dict[str, Ours | Bare] = {
        n: Bare(made) if n == "bare" else Ours(made, projected) for n in names
    }
    found: dict[str, list[float]] = {n: [] for n in names}
    for _ in range(rounds + 3):  # the first rounds compile
        for name in random.sample(names, len(names)):
            with without(GROUPS[name]):
                start = time.process_time()
                who[name].round()
                found[name].append(time.process_time() - start)
    return {n: t[3:] for n, t in found.items()}


def main() -> None:
    """Print a table in Markdown."""
    asks = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    asks.add_argument("--rounds", type=int, default=60)
    asks.add_argument("--mnist", type=Path, default=MNIST)
    asked = asks.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print(f"| workload | all on, ms | {' | '.join([*GROUPS][1:])} |\n|{'---|' * (len(GROUPS) + 1)}")
    for work, projected in CASES:
        found = times(work, projected, asked.rounds, asked.mnist)
        base, cells = found["all on"], []
        for name in [*GROUPS][1:]:
            each = [a / b for a, b in zip(found.get(name, ()), base, strict=False)]
            cells.append(f"{statistics.median(each):.2f}" if each else "")
        label = f"{work}{', projected' if projected else ''}"
        print(
            f"| {label} | {1e3 * statistics.median(base):.1f} | {' | '.join(cells)} |", flush=True
        )


if __name__ == "__main__":
    main()
