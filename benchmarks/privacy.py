"""Accuracy at a stated epsilon, and what privacy costs in time: ``python -m benchmarks.privacy --help``.

``default``: what ``fedtorch train`` does. ``iid``: ten iid clients of MNIST at epsilon 3, 8. ``clients``:
client-level privacy over 1,000 clients. ``distributed``: a server that is trusted, and one that is not,
over 200. ``opacus``: one client against Opacus's own loop at equal epsilon. ``cost``: round time of each
mode over that of a plain round. MNIST is the slice in ../shared/data.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fedtorch import (
    Client,
    FedAvg,
    Local,
    Mean,
    Recipe,
    Secure,
    Server,
    ServerSGD,
    evaluate,
    local_update,
)  # fmt: skip
from fedtorch.data import Data, Digits, Idx, Iid, partition
from fedtorch.data.base import subset
from fedtorch.engines.solver_choice import choose
from fedtorch.privacy import ClientLevel, DistributedDP, Privacy, SampleLevel
from fedtorch.privacy.accounting.events import Event, epsilon
from fedtorch.run.zoo import build
from fedtorch.training.losses import accuracy
from fedtorch.training.module import snapshot
from fedtorch.types import Task

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"


def mnist() -> Data:
    """8,000 training and 2,000 test images."""
    if not MNIST.is_dir():
        raise SystemExit(f"this benchmark needs the MNIST slice in {MNIST}")
    return Idx(str(MNIST)).load(0)


def score(model: nn.Module, data: Data) -> float:
    return evaluate(model, data.test, {"accuracy": accuracy})["accuracy"]


def summary(name: str, values: list[float], **more: Any) -> dict[str, Any]:
    row = {
        "name": name,
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "seeds": len(values),
        **more,
    }
    print(json.dumps(row), flush=True)
    return row


def quiet(server: Server, rounds: int) -> Server:
    """Train without pricing every round: the last one is priced."""
    assert server.private is not None
    server.private.figures = dict  # type: ignore[method-assign]
    for _ in range(rounds):
        server.round()
    return server


def default(seeds: int) -> None:
    """The default run: digits, 10 clients, Dirichlet 0.5, (8, 1e-5)."""
    for name, plan, lr in (("private", SampleLevel(rounds=30), 1.0), ("plain", None, 0.1)):
        values = []
        for seed in range(seeds):
            data = Digits().load(seed)
            ids, parts = partition(data, None, None, seed)
            clients = [Client(i, subset(data.train, p)) for i, p in zip(ids, parts, strict=True)]
            torch.manual_seed(seed)
            model = build("small", data.facts, {})
            recipe = Recipe(lr=lr, epochs=2, batch_size=16, privacy=plan)
            server = Server(model, clients, recipe, seed=seed)
            if plan:
                quiet(server, 30)
            else:
                list(server.rounds(30))
            values.append(score(model, data))
        spent = server.private.spent() if server.private else None
        summary(f"default {name}", values, epsilon=spent)


def features(data: Data) -> tuple[TensorDataset, TensorDataset, int]:
    """Scattering features, computed once: they are fixed, so this is the model ``scatter`` exactly."""
    model = build("scatter", data.facts, {})
    width = model.head.in_features
    model.head = nn.Identity()

    def out(part: Any) -> TensorDataset:
        x, y = part.tensors
        with torch.no_grad():
            return TensorDataset(torch.cat([model(c) for c in x.split(500)]), y)

    return out(data.train), out(data.test), width


def iid(seeds: int) -> None:
    """Ten iid clients of 800 images, sample level, delta 1e-5."""
    data = mnist()
    train, test, width = features(data)
    for target, rate, lr in ((3.0, 0.5, 4.0), (8.0, 0.25, 4.0)):
        values = []
        for seed in range(seeds):
            ids, parts = partition(data, Iid(), 10, seed)
            clients = [Client(i, subset(train, p)) for i, p in zip(ids, parts, strict=True)]
            head = nn.Linear(width, 10)
            nn.init.zeros_(head.weight)
            plan = SampleLevel(
                epsilon=target, sample_rate=rate, steps=1, batch_size=800 * rate, rounds=40
            )
            server = quiet(Server(head, clients, Recipe(lr=lr, privacy=plan), seed=seed), 40)
            values.append(evaluate(head, test, {"accuracy": accuracy})["accuracy"])
        summary(f"iid scatter epsilon {target:g}", values, epsilon=server.private.spent())


def clients(seeds: int) -> None:
    """1,000 clients of 8 images, client level, delta 1e-4, 500 a round expected."""
    data = mnist()
    train, test, width = features(data)
    for target in (3.0, 8.0):
        values = []
        for seed in range(seeds):
            ids, parts = partition(data, Iid(), 1000, seed)
            own = [Client(i, subset(train, p)) for i, p in zip(ids, parts, strict=True)]
            head = nn.Linear(width, 10)
            nn.init.zeros_(head.weight)
            plan = ClientLevel(epsilon=target, delta=1e-4, clip=0.3, rate=0.5, rounds=40)
            recipe = Recipe(
                FedAvg(server=ServerSGD(lr=1.0, momentum=0.9)), lr=1.0, epochs=1, batch_size=None,
                privacy=plan,
            )  # fmt: skip
            server = quiet(Server(head, own, recipe, engine=Local(chunk=16), seed=seed), 40)
            values.append(evaluate(head, test, {"accuracy": accuracy})["accuracy"])
        summary(f"1,000 clients epsilon {target:g}", values, epsilon=server.private.spent())


def pooled(of: Dataset) -> Dataset:
    """Means of 2 x 2 pixels, [196], centred."""
    x, y = of.tensors  # type: ignore[attr-defined]
    x = nn.functional.avg_pool2d(x.view(-1, 1, 28, 28), 2).flatten(1) - 0.13
    return TensorDataset(3 * x / x.norm(dim=1).mean(), y)


def distributed(seeds: int) -> None:
    """200 clients of 40 images, logistic on 196 means of pixels, epsilon 8 at 1e-5 in 20 rounds, by RDP."""
    data, rounds, target = mnist(), 20, 8.0
    train, test = pooled(data.train), pooled(data.test)
    # what Skellam noise needs on an endless grid is what Gaussian noise needs by RDP
    noise = DistributedDP(epsilon=target, rounds=rounds).calibrated(rounds)
    plans: dict[str, Privacy | None] = {
        "no privacy": None,
        "client level, the server adds the noise": ClientLevel(
            noise_multiplier=noise, clip=0.5, rounds=rounds
        ),
        "distributed, shares under masks": DistributedDP(epsilon=target, clip=0.5, rounds=rounds),
    }
    for name, plan in plans.items():
        values = []
        masked = plan is not None and plan.masked
        for seed in range(seeds):
            ids, parts = partition(data, Iid(), 200, seed)
            own = [Client(i, subset(train, p)) for i, p in zip(ids, parts, strict=True)]
            head = nn.Linear(196, 10)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            recipe = Recipe(
                FedAvg(server=ServerSGD(lr=1.0, momentum=0.5)), lr=1.0, epochs=5, batch_size=None,
                privacy=plan, aggregator=Secure(width=32) if masked else Mean(),
            )  # fmt: skip
            server = Server(head, own, recipe, seed=seed)
            if plan is None:
                server.fit(rounds, progress=False)
            else:
                quiet(server, rounds)
            values.append(evaluate(head, test, {"accuracy": accuracy})["accuracy"])
        summary(f"200 clients, {name}", values)


def opacus_cnn() -> nn.Module:
    """The network of Opacus's MNIST example."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def opacus(seeds: int) -> None:
    """One client and Opacus's own loop: same network, sigma 1.3, clip 1.5, lr 0.25, rate and steps."""
    from opacus import PrivacyEngine

    data = mnist()
    x, y = data.train.tensors  # type: ignore[attr-defined]
    batch, epochs = 80, 8
    steps = epochs * len(y) // batch
    spent = epsilon([Event("gaussian", 1.3, batch / len(y), steps)], 1e-5)
    ours, theirs = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = opacus_cnn()
        model = copy.deepcopy(start)
        plan = SampleLevel(
            noise_multiplier=1.3, clip=1.5, sample_rate=batch / len(y), batch_size=batch,
            steps=len(y) // batch, rounds=epochs, mode="hooks",
        )  # fmt: skip
        quiet(Server(model, [Client("only", (x, y))], Recipe(lr=0.25, privacy=plan)), epochs)
        ours.append(score(model, data))
        model = copy.deepcopy(start)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.25)
        engine: Any = PrivacyEngine()
        net, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, noise_multiplier=1.3, max_grad_norm=1.5,
            data_loader=DataLoader(TensorDataset(x, y), batch_size=batch),
        )  # fmt: skip
        for _ in range(epochs):
            for a, b in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(a), b).backward()
                optimizer.step()
        theirs.append(score(model, data))
    summary("one client, fedtorch", ours, epsilon=spent)
    summary("one client, Opacus", theirs, epsilon=spent)
    error = ((statistics.variance(ours) + statistics.variance(theirs)) / seeds) ** 0.5
    apart = abs(statistics.mean(ours) - statistics.mean(theirs))
    print(json.dumps({"apart": apart, "standard error": error, "within two": apart <= 2 * error}))


def cost(repeats: int) -> None:
    """Round time of each mode over a plain round with the same number of examples, medians of pairs."""
    shapes: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "small": (lambda: build("small", {"in_features": 64, "num_outputs": 10}, {}), 8),
        "2NN": (lambda: build("mlp", {"in_features": 784, "num_outputs": 10}, {}), 28),
        "CNN": (
            lambda: build(
                "cnn", {"input_shape": (1, 28, 28), "num_outputs": 10}, {"width": 16, "hidden": 64}
            ),
            28,
        ),
    }  # fmt: skip
    for name, (make, side) in shapes.items():
        g = torch.Generator().manual_seed(0)
        who = [
            Client(
                str(k),
                (torch.randn(150, 1, side, side, generator=g), torch.randint(0, 10, (150,), generator=g)),
            )
            for k in range(10)
        ]  # fmt: skip
        model = make()
        task = Task(snapshot(model), {}, 0, 0, 0.1, {"clip": 1.0, "noise": 1.0})
        ways: dict[str, tuple[Recipe, int]] = {"plain": (Recipe(batch_size=30, steps=5), 1)}
        for mode in ("hooks", "ghost", "stacked"):
            ways[mode] = (Recipe(privacy=SampleLevel(mode=mode, rounds=1)), 1)  # type: ignore[arg-type]
        ways["stacked x10"] = (Recipe(privacy=SampleLevel(mode="stacked", rounds=1)), 10)
        auto = choose(make(), who, Recipe(privacy=SampleLevel(rounds=1)), None, "auto")
        ways["auto"] = (auto.recipe, auto.chunk)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, (recipe, chunk) in ways.items():
                start = time.process_time()
                solve = auto.solver if way == "auto" else None
                for k in range(0, len(who), chunk):
                    local_update(who[k : k + chunk], task, recipe, model, solve)
                times[way].append(time.process_time() - start)
        ratios = {
            way: statistics.median(t / p for t, p in zip(times[way], times["plain"], strict=True))
            for way in times
        }
        chosen = f"{auto.recipe.privacy.mode} x{auto.chunk}, {type(auto.solver).__name__}"
        print(json.dumps({"model": name, "auto": chosen, "over plain": ratios}), flush=True)


def main() -> None:
    parts: dict[str, Callable[[int], None]] = {
        f.__name__: f for f in (default, iid, clients, distributed, opacus, cost)
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="which; none: all")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.parts or parts:
        parts[name](args.seeds)


if __name__ == "__main__":
    main()
