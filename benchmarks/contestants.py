"""Who is measured, on which workloads, and one measurement of one of them in this process."""

import importlib.util
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

BASELINE = "bare"


class Contestant(NamedTuple):
    """What a name stands for."""

    workloads: tuple[str, ...]
    needs: str | None = None
    """Module that must be installed."""
    coarse: float = 1.0
    """How much coarser its arithmetic is than float32, as a factor on what rounding explains."""
    alone: bool = True
    """All its work is done in the measured process, so that processor time means something."""


ALL = ("w1", "w2", "w3", "w4", "w5")

CONTESTANTS = {
    BASELINE: Contestant(ALL),
    "fedtorch": Contestant(ALL),
    "general": Contestant(ALL),
    "bf16": Contestant(("w1", "w2", "w4"), coarse=20.0),
    "projected": Contestant(("w3",)),
    "pfl": Contestant(("w1", "w2", "w4"), "pfl"),
    "jax": Contestant(ALL, "jax"),
    "opacus": Contestant(("w3", "w5"), "opacus"),
    "opacus-ghost": Contestant(("w3", "w5"), "opacus"),
    "flower": Contestant(("w1", "w2", "w4"), "flwr", alone=False),
}
"""fedtorch: what ``auto`` picks; general: the path that takes any model; bf16 and projected: options of the
fast path; the rest are peers."""


def missing(name: str) -> str | None:
    """Why this contestant cannot run here, if it cannot."""
    needs = CONTESTANTS[name].needs
    if needs and importlib.util.find_spec(needs) is None:
        return f"{needs} is not installed (see benchmarks/RESULTS.md, Peers)"
    return None


def make(name: str, problem: Any, mnist: Path) -> Any:
    """The contestant, ready for its first round. Imports only what it needs."""
    match name:
        case "fedtorch" | "general" | "bf16" | "projected":
            from benchmarks.ours import Ours

            solver = "general" if name == "general" else "auto"
            dtype = "bf16" if name == "bf16" else "float32"
            return Ours(problem, projected=name == "projected", solver=solver, dtype=dtype)
        case "pfl":
            from benchmarks.peer_pfl import Pfl

            return Pfl(problem)
        case "jax":
            from benchmarks.peer_jax import Jax

            return Jax(problem)
        case "opacus" | "opacus-ghost":
            from benchmarks import peer_opacus

            return (peer_opacus.hooks if name == "opacus" else peer_opacus.ghost)(problem)
        case "flower":
            from benchmarks.peer_flower import Flower

            return Flower(problem, mnist)
    from benchmarks.bare import Bare

    return Bare(problem)


def once(order: dict[str, Any]) -> dict[str, Any]:
    """One measurement: a warm-up round, then the workload's rounds with their evaluations."""
    start = time.time()
    import torch

    torch.set_num_threads(1)
    from benchmarks.workloads import Workload, problem

    work, mnist = Workload(**order["work"]), Path(order["mnist"])
    made = problem(work, mnist, order["seed"], order["noise"])
    torch.manual_seed(order["draw"])  # the noise of those that draw it from torch
    contestant = make(order["name"], made, mnist)
    imported = time.time() - start
    contestant.round()
    ready = time.time() - order["born"]
    first_loss = contestant.evaluate()[1]
    cpu, clock = time.process_time(), time.perf_counter()
    for r in range(1, work.rounds + 1):
        contestant.round()
        if r % work.eval_every == 0 or r == work.rounds:
            accuracy, loss = contestant.evaluate()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    getattr(contestant, "close", lambda: None)()
    alone = CONTESTANTS[order["name"]].alone
    return {
        "rounds_per_second": work.rounds / clock,
        "rounds_per_cpu_second": work.rounds / cpu if alone else None,
        "seconds_import": imported,
        "seconds_to_first_round": ready,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "accuracy": accuracy,
        "loss": loss,
        "first_loss": first_loss,
        "path": getattr(contestant, "path", None),
    }
