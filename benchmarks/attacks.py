"""Robust aggregators against simulated liars, on the bundled digits: rule, mixing before it, attack.

    python -m benchmarks.attacks [SEEDS] [FILE] [ROUNDS]

25 clients, 5 of them liars, labels by Dirichlet 0.5, an MLP of 32 hidden units, 50 ROUNDS of two epochs in
batches of 8 at rate 0.1, client momentum 0.9. Prints two tables, means over seeds, in percent: test
accuracy, and what the attack did. That is the share of test rows taken for 9 - y under a label flip, and
elsewhere the accuracy that is lost against the plain mean with nobody lying. With FILE each run is written
there as it ends, and one that is there already is not run again: take another for other ROUNDS.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from fedtorch import Client, Mean, Median, Recipe, Server, evaluate
from fedtorch.aggregation.mean import Aggregator
from fedtorch.aggregation.mixing import NNM, Bucketing, Mixing
from fedtorch.aggregation.robust import TrimmedMean
from fedtorch.aggregation.vectors import CentredClip, GeometricMedian, Krum
from fedtorch.data import Digits, Dirichlet, partition
from fedtorch.rounds.attacks import Alie, Ipm, LabelFlip, Mimic, SignFlip
from fedtorch.rounds.threat import Threat
from fedtorch.run.setup import clients as clients_of
from fedtorch.strategies import ClientMomentum
from fedtorch.training.losses import accuracy

CLIENTS, LIARS, ROUNDS = 25, 5, 50

ATTACKS: dict[str, Threat | None] = {
    "none": None,
    "label flip": LabelFlip(liars=LIARS),
    "sign flip": SignFlip(liars=LIARS),
    "mimic": Mimic(liars=LIARS),
    "IPM 0.5": Ipm(liars=LIARS, epsilon=0.5),
    "ALIE": Alie(liars=LIARS),
}
BEFORE: dict[str, Mixing | None] = {"": None, ", NNM": NNM(), ", buckets": Bucketing()}
RULES: dict[str, Aggregator] = {"mean": Mean()} | {
    name + before: kind(f=LIARS, pre=mixing, **options)
    for name, kind, options in (
        ("median", Median, {}),
        ("trimmed mean", TrimmedMean, {}),
        ("Krum", Krum, {}),
        ("RFA", GeometricMedian, {}),
        ("centred clip", CentredClip, {"tau": 0.5}),
    )
    for before, mixing in BEFORE.items()
}


def flipped(output: Tensor, target: Tensor) -> Tensor:
    """Whether a row is taken for what liars call it."""
    return (output.argmax(1) == 9 - target).float()


def score(
    rule: Aggregator, threat: Threat | None, seed: int, rounds: int = ROUNDS
) -> tuple[float, float]:
    """Test accuracy at the end, and the share of rows that are taken for 9 - y, in percent."""
    data = Digits().load(seed)
    ids, parts = partition(data, Dirichlet(alpha=0.5), CLIENTS, seed)
    clients: list[Client] = clients_of(data, ids, parts, 0.0, seed, False)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    recipe = Recipe(ClientMomentum(weighting="uniform"), batch_size=8, aggregator=rule)
    server = Server(model, clients, recipe, seed=seed, threat=threat)
    for _ in server.rounds(rounds):
        pass
    assert data.test is not None
    found = evaluate(model, data.test, {"accuracy": accuracy, "flipped": flipped})
    return 100 * found["accuracy"], 100 * found["flipped"]


def scores(
    seeds: int, file: Path | None, rounds: int = ROUNDS
) -> dict[tuple[str, str, int], tuple[float, float]]:
    """Of every rule, attack and seed."""
    found = {}
    if file and file.exists():
        for line in file.read_text().splitlines():
            rule, attack, seed, *both = json.loads(line)
            found[rule, attack, seed] = (both[0], both[1])
    for seed in range(seeds):
        for rule in RULES:
            for attack, threat in ATTACKS.items():
                if (rule, attack, seed) in found:
                    continue
                both = found[rule, attack, seed] = score(RULES[rule], threat, seed, rounds)
                if file:
                    with file.open("a") as out:
                        out.write(json.dumps([rule, attack, seed, *both]) + "\n")
    return found


def main(seeds: int, file: Path | None, rounds: int = ROUNDS) -> None:
    """Both tables, and which rules hold."""
    found = scores(seeds, file, rounds)

    def of(rule: str, attack: str, place: int = 0) -> list[float]:
        return [found[rule, attack, seed][place] for seed in range(seeds)]

    print("accuracy, mean (deviation over seeds)")
    for rule in RULES:
        cells = [of(rule, a) for a in ATTACKS]
        told = [f"{mean(c):.1f} ({stdev(c) if seeds > 1 else 0:.1f})" for c in cells]
        print("| " + " | ".join([rule, *told]) + " |")
    print("success of the attack")
    clean = mean(of("mean", "none"))
    for rule in RULES:
        told = [
            f"{mean(of(rule, a, 1)) if a == 'label flip' else clean - mean(of(rule, a)):.1f}"
            for a in ATTACKS
            if a != "none"
        ]
        print("| " + " | ".join([rule, *told]) + " |")
    for attack in ATTACKS:
        best = max(RULES, key=lambda rule: mean(of(rule, attack)))
        print(f"{attack}: {best} loses {clean - mean(of(best, attack)):.1f}")
    for rule in RULES:
        if all(mean(of(rule, a)) > clean - 5 for a in ATTACKS):
            print(f"{rule}: within 5 points of no attack in every column")


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    file = Path(given[1]) if given[1:] else None
    main(int(given[0]) if given else 5, file, int(given[2]) if given[2:] else ROUNDS)
