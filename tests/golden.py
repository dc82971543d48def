"""Final weights and figures of some forty small runs: a change of form must change none of their bits.

    python -m tests.golden --write      record them anew, in tests/golden.json
    python -m tests.golden              compare, a line for each run that differs
    --place FILE                        another record, of another kind of machine

Every option is written out: a new default moves nothing here. Noise is by seed.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import (
    Client,
    ClientOptimizer,
    FedAvg,
    FedProx,
    Local,
    Recipe,
    Scaffold,
    Server,
    ServerAdam,
    ServerYogi,
    Strategy,
    Uniform,
)
from fedtorch.aggregation.mixing import NNM, Bucketing
from fedtorch.aggregation.vectors import CentredClip, MultiKrum
from fedtorch.engines import Engine, Processes
from fedtorch.privacy import AdaptiveClip, Bands, ClientLevel, LocalDP, Privacy, SampleLevel
from fedtorch.strategies import Ditto, FedDyn, FedNova

PLACE = Path(__file__).with_name("golden.json")
ROUNDS = 3
FIGURES = ("train_loss", "step_norm", "clients", "bytes_up", "bytes_down", "privacy_epsilon")
STRATEGIES: dict[str, Strategy] = {
    "fedavg": FedAvg(weighting="examples"),
    "fedprox": FedProx(mu=0.1, weighting="examples"),
    "scaffold": Scaffold(weighting="uniform"),
    "adam": FedAvg(weighting="examples", server=ServerAdam(lr=0.05)),
}
COMMON: dict[str, Any] = dict(
    delta=1e-5,
    rounds=ROUNDS,
    accountant="prv",
    budget="stop",
    strict=False,
    rng="aes",
    insecure_seed=7,
)
STEPS: dict[str, Any] = dict(sample_rate=0.25, steps=3, batch_size=8.0, max_batch=64, **COMMON)
PLANS: dict[str, Privacy] = {
    "stacked": SampleLevel(clip=1.0, epsilon=8.0, mode="stacked", **STEPS),
    "hooks": SampleLevel(clip=1.0, epsilon=8.0, mode="hooks", **STEPS),
    "ghost": SampleLevel(clip=1.0, epsilon=8.0, mode="ghost", **STEPS),
    "alone": SampleLevel(clip=1.0, epsilon=8.0, mode="alone", **STEPS),
    "sample": SampleLevel(clip=1.0, noise_multiplier=1.0, mode="auto", **STEPS),
    "projected": SampleLevel(clip=1.0, noise_multiplier=1.0, mode="auto", projected=True, **STEPS),
    "client": ClientLevel(clip=0.5, epsilon=8.0, rate=0.7, **COMMON),
    "capped": ClientLevel(clip=0.5, noise_multiplier=1.0, rate=1.0, weight_cap=30, **COMMON),
    "adaptive": ClientLevel(
        clip=0.5, noise_multiplier=0.4, rate=1.0,
        adaptive=AdaptiveClip(start=0.3, quantile=0.5, lr=0.2), **COMMON,
    ),
    "bands": ClientLevel(clip=0.5, epsilon=8.0, rate=1.0, bands=Bands(count=2), **COMMON),
    "local": LocalDP(clip=0.5, epsilon=8.0, mechanism="gaussian", **COMMON),
    "laplace": LocalDP(clip=0.5, epsilon=8.0, mechanism="laplace", **COMMON),
}  # fmt: skip


def mlp() -> nn.Module:
    """Two dense layers, of which the fast path knows all."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 4))


def wide() -> nn.Module:
    """Enough weights for products in bfloat16."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 600), nn.ReLU(), nn.Linear(600, 4))


def dropped() -> nn.Module:
    """A dense network with dropout."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 4)
    )


def cnn() -> nn.Module:
    """Convolutions and GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 4)
    )  # fmt: skip


def normed() -> nn.Module:
    """BatchNorm: buffers travel, and the whole batch is looked at."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)
    )


MODELS = {f.__name__: f for f in (mlp, wide, dropped, cnn, normed)}


def runs() -> Iterator[tuple[str, str, Strategy, Engine, Privacy | None, dict[str, Any]]]:
    """Name, model, strategy, engine, plan and further options of the recipe, of each run."""
    for name, strategy in STRATEGIES.items():
        for solver in ("general", "stacked", "fast"):
            yield f"{name} {solver}", "mlp", strategy, local(solver), None, {}
    for name in ("fedavg", "scaffold"):
        workers = Processes(workers=2, chunk=3, device="cpu", solver="stacked", dtype="float32")
        yield f"{name} processes", "mlp", STRATEGIES[name], workers, None, {}
    for solver in ("general", "stacked", "fast"):
        yield f"dropout {solver}", "dropped", STRATEGIES["fedavg"], local(solver), None, {}
    for model in ("cnn", "normed"):
        for solver in ("general", "stacked"):
            yield f"{model} {solver}", model, STRATEGIES["fedprox"], local(solver), None, {}
    momentum = ClientOptimizer(name="SGD", args={"momentum": 0.9, "weight_decay": 1e-3})
    yield (
        "momentum fast",
        "mlp",
        STRATEGIES["fedprox"],
        local("fast"),
        None,
        {"optimizer": momentum},
    )
    adam = ClientOptimizer(name="Adam", args={})
    yield (
        "adamlocal stacked",
        "mlp",
        STRATEGIES["fedavg"],
        local("stacked"),
        None,
        {"optimizer": adam},
    )
    bf16 = Local(chunk=3, device="cpu", solver="fast", dtype="bf16")
    yield "bf16 fast", "wide", STRATEGIES["fedavg"], bf16, None, {}
    yield "wide fast", "wide", STRATEGIES["fedavg"], local("fast"), None, {}
    whole = {"loss": nn.CrossEntropyLoss()}
    yield "whole batches", "mlp", STRATEGIES["fedavg"], local("auto"), None, whole
    yogi = FedAvg(weighting="uniform", server=ServerYogi(lr=0.05))
    yield "yogi steps", "mlp", yogi, local("auto"), None, {"steps": 3, "drop_last": True}
    for name, plan in PLANS.items():
        solver = "fast" if name in ("sample", "projected") else "auto"
        model = "cnn" if name in ("hooks", "ghost") else "mlp"
        strategy = FedAvg(weighting="uniform")
        yield f"plan {name}", model, strategy, local(solver), plan, {}
    yield (
        "plan client scaffold",
        "mlp",
        STRATEGIES["scaffold"],
        local("general"),
        PLANS["client"],
        {},
    )
    yield "fednova fast", "mlp", FedNova(mu=0.1, weighting="examples"), local("fast"), None, {}
    yield "feddyn stacked", "mlp", FedDyn(alpha=0.1), local("stacked"), None, {}
    yield "ditto general", "normed", Ditto(lam=0.5), local("general"), None, {}
    whom: dict[str, Any] = {"aggregator": MultiKrum(f=1, m=3, pre=NNM())}
    yield "krum fast", "mlp", FedAvg(weighting="uniform"), local("fast"), None, whom
    clipped: dict[str, Any] = {
        "aggregator": CentredClip(f=0, tau=0.1, steps=2, pre=Bucketing(size=2))
    }
    yield "clip general", "mlp", FedAvg(weighting="uniform"), local("general"), None, clipped
    prox = FedProx(mu=0.1, weighting="uniform")
    yield "plan sample fedprox", "mlp", prox, local("general"), PLANS["sample"], {}


def local(solver: str) -> Engine:
    """In this process, three clients at a time."""
    return Local(chunk=3, device="cpu", solver=solver, dtype="float32")


def clients() -> list[Client]:
    """Seven, of different sizes, no batch of one."""
    draw = torch.Generator().manual_seed(11)
    made = []
    for k, n in enumerate((40, 18, 33, 26, 12, 37, 22)):
        x = torch.randn(n, 1, 8, 8, generator=draw) * (torch.rand(n, 1, 8, 8, generator=draw) < 0.6)
        y = torch.randint(0, 4, (n,), generator=draw)
        made.append(Client(f"c{k}", (x + y.view(-1, 1, 1, 1) / 4, y)))
    return made


def outcome(
    model: str, strategy: Strategy, engine: Engine, plan: Privacy | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Digest of the final state, figures of all rounds, and enough weights to compare roughly."""
    torch.manual_seed(5)
    asked = {"lr": 0.1, "epochs": 2, "steps": None, "batch_size": 8, "drop_last": False, **options}
    optimizer = asked.pop("optimizer", ClientOptimizer(name="SGD", args={}))
    recipe = Recipe(strategy, privacy=plan, optimizer=optimizer, **asked)
    drawn = None if isinstance(plan, ClientLevel) else Uniform(cohort_size=5)
    given = {"participation": drawn} if drawn else {}
    server = Server(MODELS[model](), clients(), recipe, engine=engine, seed=3, **given)
    try:
        figures = [{k: f[k] for k in FIGURES if k in f} for f in server.rounds(ROUNDS)]
        state = server.model.state_dict()
    finally:
        server.close()
    flat = torch.cat([v.double().flatten() for v in state.values()])
    return {
        "weights": digest(state.values()),
        "figures": [v for f in figures for v in f.values()],
        "norm": float(flat.norm()),
        "some": flat[:: max(1, len(flat) // 8)].tolist(),
    }


def differ(found: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """What is not as it was: bits of weights, and figures beyond what a place in memory makes of a sum."""
    pairs = zip(found["figures"], known["figures"], strict=True)
    close = all(math.isclose(a, b, rel_tol=1e-6) for a, b in pairs)
    return ["weights"] * (found["weights"] != known["weights"]) + ["figures"] * (not close)


def digest(tensors: Any) -> str:
    """Of the very bits."""
    whole = hashlib.sha256()
    for t in tensors:
        whole.update(bits(t))
    return whole.hexdigest()[:16]


def bits(t: Tensor) -> bytes:
    """A tensor's numbers as they lie in memory."""
    return t.detach().cpu().contiguous().numpy().tobytes()


def machine() -> str:
    """What decides the last bits: processor's family, libraries, threads, compiled loops."""
    jit = find_spec("numba") and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"
    numba = "loops" if jit else "no loops"
    cpu = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    by = f"{maker()} {platform.machine()} {cpu}"
    return f"{by}, torch {torch.__version__}, {threads} thread, {numba}"


def maker() -> str:
    """Whose processor it is: MKL multiplies in another order on one that is not Intel's."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return next((w.split(":")[1].strip() for w in lines if w.startswith("vendor_id")), "unknown")


def main() -> int:
    """Compare with what is recorded, or record."""
    asks = argparse.ArgumentParser(description=__doc__)
    asks.add_argument("--write", action="store_true", help="record what comes out now")
    asks.add_argument("--only", default="", help="part of the runs' names")
    asks.add_argument("--place", type=Path, default=PLACE, help="the record, %(default)s")
    asked = asks.parse_args()
    torch.set_num_threads(1)
    found = {name: outcome(*rest) for name, *rest in runs() if asked.only in name}
    if asked.write:
        asked.place.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")
        return 0
    known = json.loads(asked.place.read_text())
    print(f"here: {machine()}\nthere: {known['machine']}")
    moved = [n for n in found if differ(found[n], known["runs"][n])]
    for name in moved:
        what = [k for k in ("weights", "figures") if found[name][k] != known["runs"][name][k]]
        print(
            f"{name}: {', '.join(what)} differ; norm {known['runs'][name]['norm']} -> {found[name]['norm']}"
        )
    print(f"{len(found) - len(moved)} of {len(found)} runs are as they were")
    return bool(moved)


if __name__ == "__main__":
    sys.exit(main())
