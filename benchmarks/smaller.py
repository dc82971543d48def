"""Accuracy against bytes sent: the stages of the channel on the MNIST slice.

    python -m benchmarks.smaller [SEEDS] [PICTURE.svg] [MNIST]
    python -m benchmarks.smaller long [SEEDS]       # how far top 1 % is behind dense, over twice the rounds

10 clients, Dirichlet 0.5, an MLP 784-64-10, 25 rounds of one epoch in batches of 20 at rate 0.1. Prints
test accuracy at the end, its deviation over seeds, and megabytes up. Without the files of MNIST (by default
in ../shared/data/mnist) it says so and ends. Each run is kept in ``build/measured`` and not measured again.
"""

import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from benchmarks.kept import once
from benchmarks.picture import draw
from benchmarks.workloads import MNIST
from fedtorch import (
    QSGD,
    Client,
    PowerSGD,
    RandomK,
    Recipe,
    Server,
    Sign,
    Stage,
    TopK,
    evaluate,
)
from fedtorch.data import Dirichlet, Idx, partition
from fedtorch.run.setup import clients as clients_of
from fedtorch.training.losses import accuracy

CLIENTS, ROUNDS, SHOWN = 10, 25, (10, 25, 30, 40, 50)

CHANNELS: dict[str, tuple[Stage, ...]] = {
    "dense": (),
    "QSGD, 15 levels": (QSGD(),),
    "sign": (Sign(),),
    "random 10 %": (RandomK(share=0.1),),
    "PowerSGD, rank 2": (PowerSGD(),),
    "top 1 %": (TopK(share=0.01),),
    "top 1 %, QSGD": (TopK(share=0.01), QSGD()),
}


def course(
    mnist: Path, channel: tuple[Stage, ...], seed: int, rounds: int = ROUNDS
) -> list[tuple[float, float]]:
    """(megabytes up so far, test accuracy) of each round."""
    data = Idx(str(mnist)).load(seed)
    ids, parts = partition(data, Dirichlet(alpha=0.5), CLIENTS, seed)
    clients: list[Client] = clients_of(data, ids, parts, 0.0, seed, False)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    recipe = Recipe(epochs=1, batch_size=20, channel=channel)
    server = Server(model, clients, recipe, seed=seed)
    found, sent = [], 0.0
    for figures in server.rounds(rounds):
        sent += figures["bytes_up"] / 1e6
        found.append((sent, evaluate(model, data.test, {"a": accuracy})["a"]))
    return found


def main(seeds: int, picture: Path | None, mnist: Path) -> None:
    """A line for each channel, and a picture of the means."""
    if not mnist.is_dir():
        print(f"no MNIST files in {mnist}: nothing measured")
        return
    drawn = {}
    for name, channel in CHANNELS.items():
        asked = [partial(course, mnist, channel, seed) for seed in range(seeds)]
        found = [once("smaller", [ROUNDS, name, k], run) for k, run in enumerate(asked)]
        ends = [c[-1][1] for c in found]
        spread = stdev(ends) if seeds > 1 else 0
        print(f"| {name} | {mean(ends):.4f} ({spread:.4f}) | {found[0][-1][0]:.3f} |", flush=True)
        drawn[name] = [(c[0][0], mean(a for _, a in c)) for c in zip(*found, strict=True)]
    if picture:
        draw(picture, drawn, "megabytes up, all clients", "test accuracy", log=True)


def behind(seeds: int) -> None:
    """Points that top 1 % is behind dense, seed by seed, after some rounds."""
    last, runs = SHOWN[-1], []
    for name in ("dense", "top 1 %"):
        asked = [partial(course, MNIST, CHANNELS[name], seed, last) for seed in range(seeds)]
        runs.append([once("smaller", [last, name, k], run) for k, run in enumerate(asked)])
    print("| round | dense | top 1 % | behind, points |\n| --- | --- | --- | --- |")
    for n in SHOWN:
        dense, top = ([100 * found[n - 1][1] for found in own] for own in runs)
        less = [a - b for a, b in zip(dense, top, strict=True)]
        spread = stdev(less) if seeds > 1 else 0
        print(f"| {n} | {mean(dense):.1f} | {mean(top):.1f} | {mean(less):.2f} ({spread:.2f}) |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    if given[:1] == ["long"]:
        behind(int(given[1]) if given[1:] else 5)
        sys.exit()
    main(
        int(given[0]) if given else 3,
        Path(given[1]) if given[1:] else None,
        Path(given[2]) if given[2:] else MNIST,
    )
