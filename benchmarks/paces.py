"""Simulated seconds to an accuracy: rounds that wait against rounds that do not, on one clock.

    python -m benchmarks.paces [SEEDS] [PICTURE.svg]

The bundled digits, 30 clients, Dirichlet 0.5, an MLP of 32 hidden units, 2 epochs in batches of 8 at rate
0.1. An example takes a second; clients' speeds are lognormal with deviation 1.2, so that the slowest of
thirty is some ten times as slow as the one in the middle. Ten clients are under way at any time. Prints
simulated seconds to 90 % test accuracy, the accuracy at the end, and visits of the busiest client over
the usual one's.
"""

import sys
from pathlib import Path
from statistics import mean, median, stdev

import torch
from torch import nn

from benchmarks.picture import draw
from fedtorch import Client, Everyone, FedAvg, Recipe, Server, Uniform, evaluate
from fedtorch.data import Digits, Dirichlet, partition
from fedtorch.rounds.buffered import Asynchronous, Buffered
from fedtorch.rounds.clock import Clock
from fedtorch.rounds.participation import Participation
from fedtorch.rounds.synchronous import OverSelected, Rounds, Synchronous
from fedtorch.run.setup import clients as clients_of
from fedtorch.training.losses import accuracy

CLIENTS, AT_ONCE, GOAL, END = 30, 10, 0.9, 25_000.0
CLOCK = Clock(spread=1.2, jitter=0.2)

PACES: dict[str, tuple[Rounds, Participation, int]] = {
    "synchronous, 10": (Synchronous(clock=CLOCK), Uniform(cohort_size=AT_ONCE), 1),
    "over-selected, 13": (OverSelected(clock=CLOCK), Uniform(cohort_size=13), 1),
    "FedBuff, 5 of 10": (Buffered(size=5, concurrency=AT_ONCE, clock=CLOCK), Everyone(), 1),
    "FedAsync, 1 of 10": (Asynchronous(concurrency=AT_ONCE, clock=CLOCK), Everyone(), 5),
}
"""The pace, who is asked, and after how many steps the model is judged."""


def course(name: str, seed: int) -> tuple[list[tuple[float, float]], float]:
    """(simulated seconds, test accuracy) of the steps, and visits of the busiest client over the usual."""
    pace, who, every = PACES[name]
    data = Digits().load(seed)
    ids, parts = partition(data, Dirichlet(alpha=0.5), CLIENTS, seed)
    clients: list[Client] = clients_of(data, ids, parts, 0.0, seed, False)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    recipe = Recipe(FedAvg(weighting="uniform"), batch_size=8)
    server = Server(model, clients, recipe, pace=pace, participation=who, seed=seed)
    found, now, busy = [(0.0, 0.1)], 0.0, 0.0
    while now < END:
        figures = server.round()
        now, busy = (
            figures["simulated_seconds"],
            figures["visits_max"] / max(figures["visits_median"], 1),
        )
        if server.round_number % every == 0:
            found.append((now, evaluate(model, data.test, {"a": accuracy})["a"]))
    return found, busy


def reached(curve: list[tuple[float, float]]) -> float:
    """Seconds until the goal is met."""
    return next((t for t, a in curve if a >= GOAL), float("inf"))


def main(seeds: int, picture: Path | None) -> None:
    """A line for each pace, and a picture of the first seed."""
    drawn = {}
    for name in PACES:
        found = [course(name, seed) for seed in range(seeds)]
        times = [reached(c) for c, _ in found]
        last = [mean(a for _, a in c[-5:]) for c, _ in found]
        spread = stdev(times) if seeds > 1 else 0
        print(
            f"| {name} | {mean(times):,.0f} ({spread:,.0f}) | {mean(last):.3f} "
            f"| {median(b for _, b in found):.1f} |",
            flush=True,
        )
        # the mean over seeds in steps of the axis
        axis = [END * k / 60 for k in range(61)]
        drawn[name] = [
            (t, mean(max((a for s, a in c if s <= t), default=0.1) for c, _ in found)) for t in axis
        ]
    if picture:
        draw(picture, drawn, "simulated seconds", "best test accuracy so far")


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    main(int(given[0]) if given else 5, Path(given[1]) if given[1:] else None)
