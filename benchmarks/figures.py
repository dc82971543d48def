"""Figures inside the budget, held to the true ones: ``python -m benchmarks.figures``.

The default private run, strict, that pays for figures. What was released is compared with the accuracy of
the model as it was sent, on all clients' training data, which nobody but this script may see.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing

import torch

import train
from fedtorch import Server, evaluate
from fedtorch.data import partition
from fedtorch.run import setup
from fedtorch.training.losses import accuracy

SEEDS = 5
SETTINGS = ((0.15, 10), (0.15, 5))
"""``metrics_epsilon`` and ``metrics_every``."""


def figures(arguments: Sequence[str]) -> Iterator[tuple[dict[str, float], float]]:
    """Of each round that tells them: the round's figures, and the true accuracy."""
    config = train.read_config(arguments)
    data = config.dataset.load(config.seed)
    ids, parts = partition(data, config.partition, config.clients, config.seed)
    clients = setup.clients(data, ids, parts, 0.0, config.seed, True)
    loss, _ = setup.loss_and_metrics(data.kind, config.loss, config.metrics)
    torch.manual_seed(config.seed)
    model = train.make_model(config, data)
    with closing(Server(model, clients, config.recipe(loss), seed=config.seed)) as server:
        for _ in range(config.rounds):
            true = evaluate(server.model, data.train, {"accuracy": accuracy})["accuracy"]
            found = server.round()
            if "noised_accuracy" in found:
                yield found, true


def main() -> int:
    """One line for each setting; the last column has the last figure of each seed."""
    print(
        "| metrics_epsilon, every | epsilon | noise of training | off by, mean | within 0.03 | last ones |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for take, every in SETTINGS:
        off, ends, found = list[float](), list[float](), dict[str, float]()
        for seed in range(SEEDS):
            given = {"metrics-epsilon": take, "metrics-every": every, "strict": "true"}
            options = [w for k, v in given.items() for w in (f"--privacy.{k}", str(v))]
            for found, true in figures([*options, "--seed", str(seed)]):
                off.append(abs(found["noised_accuracy"] - true))
            ends.append(off[-1])
        cost, noise = found["privacy_epsilon"], found["privacy_noise_multiplier"]
        print(
            f"| {take:g}, {every} rounds | {cost:.3f} | {noise:.4f} | {sum(off) / len(off):.4f} | "
            f"{sum(d <= 0.03 for d in off)} of {len(off)} | {' '.join(f'{d:.3f}' for d in ends)} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
