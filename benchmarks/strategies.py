"""Strategies on MNIST's 10,000 test images (8,000 to train on, 2,000 to judge by) over 20 uneven clients.

    python -m benchmarks.strategies personal [SEEDS]        # each client's own model on its own rows
    python -m benchmarks.strategies rounds [SEEDS] [PNG]    # one model for all, accuracy by round
    python -m benchmarks.strategies speed [ROUNDS [WORK [NAME ...]]]   # rounds per second over FedAvg's

A network of one hidden layer (784-64-10), batches of 32, one local pass, rate 0.1, nothing tuned: every
strategy has the options that it comes with, or those that the tables name.

Each run is kept in ``build/measured`` as it ends and not measured again: who was stopped goes on.
"""

import statistics
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from benchmarks.kept import once
from benchmarks.workloads import MNIST, WORKLOADS, problem
from fedtorch import Client, Local, RandomK, Recipe, Server, Uniform, divide, evaluate
from fedtorch.data import Dirichlet, Idx, Partition, Shards
from fedtorch.data.base import Data
from fedtorch.rounds.buffered import Buffered
from fedtorch.rounds.clock import Clock
from fedtorch.run.finetune import finetuned
from fedtorch.strategies import (
    APFL,
    Ditto,
    FedAvg,
    FedDyn,
    FedNova,
    FedPer,
    FedProx,
    FedRep,
    QFedAvg,
    Scaffold,
    Strategy,
)
from fedtorch.strategies.base import Solve
from fedtorch.training.evaluate import evaluate_clients
from fedtorch.training.losses import accuracy
from fedtorch.types import Context, Stack

CLIENTS, ROUNDS, RATE, BATCH, FINE = 20, 10, 0.1, 32, 100
PERSONAL: dict[str, Strategy] = {
    "FedAvg": FedAvg(),
    "APFL": APFL(),
    "FedPer": FedPer(),
    "Ditto": Ditto(),
    "Ditto, lam 0.1": Ditto(lam=0.1),
    "FedRep": FedRep(),
}
PUBLISHED = {"FedAvg": 85.85, "APFL": 97.25, "FedPer": 97.44, "Ditto": 97.47, "FedRep": 97.56}
"""PFLlib's table: Fashion-MNIST, Dirichlet 0.1, 20 clients, a CNN, the best of up to 2,000 rounds."""
SHARED: dict[str, Strategy] = {
    "FedAvg": FedAvg(),
    "FedProx, mu 0.01": FedProx(),
    "SCAFFOLD": Scaffold(),
    "FedNova": FedNova(),
    "FedDyn, alpha 0.1": FedDyn(),
}
SKEWS: dict[str, Partition] = {"Dirichlet 0.1": Dirichlet(alpha=0.1), "2 classes each": Shards()}
SHOWN = (1, 2, 5, 10, 15)
STYLES = ("-", (0, (6, 6)), "-", (0, (2, 4)), "-")
"""Of lines that may lie on each other."""


def network(seed: int) -> nn.Module:
    """With a body and a head by name."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(64, 10)))


@cache
def images(seed: int) -> Data:
    """Read once."""
    return Idx(str(MNIST)).load(seed)


def served(
    strategy: Strategy, skew: Partition, seed: int, share: float
) -> tuple[Server, list[Client], object]:
    """A server before its first round, its clients and the test set."""
    clients, test = divide(images(seed), skew, CLIENTS, validation=share, seed=seed)
    recipe = Recipe(strategy, lr=RATE, batch_size=BATCH)
    return Server(network(seed), clients, recipe, seed=seed), clients, test


def personal(seeds: int) -> None:
    """Mean and worst over clients of each one's model on a quarter of its rows, held out."""
    found: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        for name in PERSONAL:
            runs = once("personal", [ROUNDS, name, seed], partial(own_models, name, seed))
            for kind, scores in runs.items():
                found.setdefault(kind, []).append(scores)
    print(
        "| model | mean of clients | worst client | PFLlib, Fashion-MNIST |\n| --- | --- | --- | --- |"
    )
    for kind, pairs in found.items():
        mean, worst = (spread([p[i] for p in pairs]) for i in (0, 1))
        print(f"| {kind} | {mean} | {worst} | {PUBLISHED.get(kind, '')} |", flush=True)


def own_models(name: str, seed: int) -> dict[str, list[float]]:
    """Mean and worst of a strategy's clients; of FedAvg's also those of its model fine-tuned."""
    server, clients, _ = served(PERSONAL[name], Dirichlet(alpha=0.1), seed, 0.25)
    for _ in server.rounds(ROUNDS):
        pass
    models = {name: server.own()}
    if name == "FedAvg":
        models["the same, fine-tuned"] = finetuned(server, clients, FINE)
    found = {}
    for kind, own in models.items():
        each = evaluate_clients(server.model, clients, {"a": accuracy}, own)
        scores = [100 * s["a"] for s in each.values()]
        found[kind] = [statistics.mean(scores), min(scores)]
    return found


def rounds(seeds: int, picture: str | None) -> None:
    """Test accuracy of the one model."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for skew, partition in SKEWS.items():
        print(f"| {skew} | " + " | ".join(f"round {n}" for n in SHOWN) + " |")
        print("| --- |" + " --- |" * len(SHOWN))
        for name, strategy in SHARED.items():
            asked = [partial(curve, strategy, partition, seed) for seed in range(seeds)]
            keys = [[SHOWN[-1], skew, name, seed] for seed in range(seeds)]
            runs = [once("rounds", key, measure) for key, measure in zip(keys, asked, strict=True)]
            curves.setdefault(skew, {})[name] = runs
            cells = [spread([run[n - 1] for run in runs]) for n in SHOWN]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if picture:
        drawn(curves, picture)


def curve(strategy: Strategy, partition: Partition, seed: int) -> list[float]:
    """Percent after each round."""
    server, _, test = served(strategy, partition, seed, 0.0)
    found = []
    for _ in server.rounds(SHOWN[-1]):
        found.append(100 * evaluate(server.model, test, {"a": accuracy})["a"])
    return found


def drawn(curves: dict[str, dict[str, list[list[float]]]], path: str) -> None:
    """A panel for each skew, means over seeds."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(9, 3.4), sharey=True)
    for panel, (skew, lines) in zip(panels, curves.items(), strict=True):
        for style, (name, runs) in zip(STYLES, lines.items(), strict=False):
            means = [statistics.mean(values) for values in zip(*runs, strict=True)]
            panel.plot(range(1, len(means) + 1), means, label=name, linewidth=1.6, linestyle=style)
        panel.set(title=skew, xlabel="round", ylim=(20, 96))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    panels[-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


W1, W2 = WORKLOADS["w1"], WORKLOADS["w2"]
WORKS = {
    "w1": W1,
    "w1-32": replace(W1, hidden=32),
    "w2": W2,
    "w1-long": replace(W1, examples=300, epochs=2),
    "w2-long": replace(W2, epochs=3),
    "w7": WORKLOADS["w7"],
}
"""What rounds are timed of; the first three unless asked otherwise."""


def speed(many: int, asked: str | None, names: list[str]) -> None:
    """Processor time of rounds that take turns, all on the fast path; ``names``: some beside FedAvg."""
    kinds: dict[str, tuple[Strategy, dict[str, Any], dict[str, Any]]] = {
        "FedAvg": (FedAvg(), {}, {}),
        "FedNova": (FedNova(), {}, {}),
        "q-FedAvg": (QFedAvg(), {}, {}),
        "SCAFFOLD": (Scaffold(), {}, {}),
        "FedDyn": (FedDyn(), {}, {}),
        "Ditto": (Ditto(), {}, {}),
        "Ditto's shared half": (SharedHalf(), {}, {}),
        "random-k, a tenth": (FedAvg(), {"channel": (RandomK(share=0.1),)}, {}),
        "10 of 100 by chance": (FedAvg(), {}, {"participation": Uniform(cohort_size=10)}),
        "buffered, 10 of 10": (FedAvg(), {}, {"pace": Buffered(size=10, clock=Clock(spread=0.5))}),
        "buffered, equally fast": (FedAvg(), {}, {"pace": Buffered(size=10)}),
    }
    kinds = {n: k for n, k in kinds.items() if not names or n in ("FedAvg", *names)}
    for place, work in WORKS.items():
        if place != asked if asked else place not in [*WORKS][:3]:
            continue
        servers = {}
        for name, (strategy, options, more) in kinds.items():
            given = problem(replace(work, clients=100) if "participation" in more else work)
            clients = [Client(str(k), shard) for k, shard in enumerate(given.shards)]
            recipe = replace(given.recipe(), strategy=strategy, **options)
            engine = Local(solver="fast")
            servers[name] = Server(given.model(), clients, recipe, engine=engine, **more)
            servers[name].round()
        taken: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(many if work.model == "mlp" else max(2, many // 8)):
            for name, server in [*servers.items()][:: -1 if turn % 2 else 1]:
                start = time.process_time()
                server.round()
                taken[name].append(time.process_time() - start)
        for name, own in taken.items():
            ratio = statistics.median(a / b for a, b in zip(taken["FedAvg"], own, strict=True))
            took = f"{1e3 * statistics.median(own):.1f} ms"
            print(f"| {place} | {name} | {took} | {ratio:.2f} |", flush=True)


@dataclass(frozen=True, kw_only=True)
class SharedHalf(Ditto):
    """Ditto without its clients' own passes: what it costs to keep and carry their models is there."""

    def train(self, solve: Solve, ctx: Context) -> tuple[Any, dict[str, Stack]]:
        """The shared pass alone."""
        return solve(), {"v": ctx.memory["v"]}


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} +- {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main(words: list[str]) -> None:
    """Which of them."""
    torch.set_num_threads(1)
    number = int(words[1]) if len(words) > 1 else None
    if words[:1] == ["personal"]:
        personal(number or 5)
    elif words[:1] == ["rounds"]:
        rounds(number or 5, words[2] if len(words) > 2 else None)
    elif words[:1] == ["speed"]:
        speed(number or 24, words[2] if len(words) > 2 else None, words[3:])
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
