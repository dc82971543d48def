"""Robust aggregators against simulated liars, on the bundled digits.

    python -m benchmarks.attacks [SEEDS]

25 clients, 5 of them liars, labels by Dirichlet 0.5, an MLP of 32 hidden units, 40 rounds of two epochs in
batches of 8 at rate 0.1, client momentum 0.9. Prints test accuracy in percent, mean over seeds, for each
rule, with and without mixing before it, against each attack.
"""

import sys

import torch
from torch import nn

from fedtorch import Client, Mean, Median, Recipe, Server, evaluate
from fedtorch.aggregation.mean import Aggregator
from fedtorch.aggregation.mixing import NNM, Bucketing
from fedtorch.aggregation.robust import TrimmedMean
from fedtorch.aggregation.vectors import CentredClip, GeometricMedian, Krum
from fedtorch.data import Digits, Dirichlet, partition
from fedtorch.rounds.threat import Alie, Ipm, LabelFlip, Mimic, SignFlip, Threat
from fedtorch.run.setup import clients as clients_of
from fedtorch.strategies import ClientMomentum
from fedtorch.training.losses import accuracy

CLIENTS, LIARS, ROUNDS = 25, 5, 40

ATTACKS: dict[str, Threat | None] = {
    "none": None,
    "label flip": LabelFlip(liars=LIARS),
    "sign flip": SignFlip(liars=LIARS),
    "mimic": Mimic(liars=LIARS),
    "IPM 0.5": Ipm(liars=LIARS, epsilon=0.5),
    "ALIE": Alie(liars=LIARS),
}
RULES: dict[str, Aggregator] = {
    "mean": Mean(),
    "median": Median(f=LIARS),
    "trimmed mean": TrimmedMean(f=LIARS),
    "Krum": Krum(f=LIARS),
    "RFA": GeometricMedian(f=LIARS),
    "centred clip": CentredClip(f=LIARS, tau=0.5),
    "trimmed, NNM": TrimmedMean(f=LIARS, pre=NNM()),
    "RFA, NNM": GeometricMedian(f=LIARS, pre=NNM()),
    "RFA, buckets": GeometricMedian(f=LIARS, pre=Bucketing()),
}


def score(rule: Aggregator, threat: Threat | None, seed: int) -> float:
    """Test accuracy at the end."""
    data = Digits().load(seed)
    ids, parts = partition(data, Dirichlet(alpha=0.5), CLIENTS, seed)
    clients: list[Client] = clients_of(data, ids, parts, 0.0, seed, False)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    recipe = Recipe(ClientMomentum(weighting="uniform"), batch_size=8, aggregator=rule)
    server = Server(model, clients, recipe, seed=seed, threat=threat)
    for _ in server.rounds(ROUNDS):
        pass
    assert data.test is not None
    return 100 * evaluate(model, data.test, {"accuracy": accuracy})["accuracy"]


def main(seeds: int) -> None:
    """The table, a row as soon as it is known."""
    print(f"{'':<14}" + "".join(f"{name:>11}" for name in ATTACKS), flush=True)
    for name, rule in RULES.items():
        found = [
            sum(score(rule, threat, seed) for seed in range(seeds)) / seeds
            for threat in ATTACKS.values()
        ]
        print(f"{name:<14}" + "".join(f"{v:>11.1f}" for v in found), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if sys.argv[1:] else 3)
