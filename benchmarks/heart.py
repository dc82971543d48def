"""UCI Heart Disease over its four hospitals, as in FLamby (Ogier du Terrail 2022, arXiv:2210.04620).

    python benchmarks/heart.py ../shared/data/heart-disease

Logistic regression, 15 rounds of 100 local steps, batch 4, five seeds. Prints, for each algorithm, the
accuracy on the pooled test sets (mean and standard deviation over seeds) and the mean over the four
hospitals, beside the published figures.
"""

import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fedtorch import (
    Client,
    ClientOptimizer,
    FedAvg,
    FedProx,
    Recipe,
    Scaffold,
    Server,
    ServerAdagrad,
    ServerAdam,
    ServerSGD,
    ServerYogi,
    evaluate,
)
from fedtorch.losses import binary_accuracy, binary_cross_entropy

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
Split = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

# strategy, client learning rate, published accuracy: pooled test sets, mean over hospitals
RUNS = {
    "FedAvg": (FedAvg(), 1e-3, 0.7480, 0.6850),
    "FedProx": (FedProx(mu=0.01), 1e-3, 0.7480, 0.6850),
    "SCAFFOLD": (Scaffold(ServerSGD(lr=1.0)), 1e-3, 0.7480, 0.6840),
    "FedAdam": (FedAvg(ServerAdam(lr=1e-2, tau=1e-8, beta2=0.999)), 1e-2, 0.7787, 0.7255),
    "FedAdagrad": (FedAvg(ServerAdagrad(lr=0.316228, tau=1e-8)), 3.162e-3, 0.7787, 0.7314),
    "FedYogi": (FedAvg(ServerYogi(lr=1e-2, tau=1e-8, beta2=0.999)), 3.162e-3, 0.7787, 0.7314),
}


def table(path: Path) -> np.ndarray:
    """Rows without missing values; columns 10, 11, 12 are mostly missing outside Cleveland."""
    rows = [line.replace("?", "nan").split(",") for line in path.read_text().split()]
    values = np.delete(np.array(rows, dtype=float), [10, 11, 12], axis=1)
    return values[~np.isnan(values).any(1)]


def hospitals(folder: Path) -> list[Split]:
    """Train and test (x, y) of each hospital; 13 features, scaled by its own training rows."""
    tables = [table(folder / f"processed.{name}.data") for name in HOSPITALS]
    pooled = np.concatenate(tables)
    levels = {c: np.unique(pooled[:, c])[1:] for c in (2, 6)}
    made = []
    for rows in tables:
        onehot = [(rows[:, c, None] == levels[c]).astype(float) for c in levels]
        plain = np.delete(rows[:, :-1], list(levels), axis=1)
        x, y = np.concatenate([plain, *onehot], axis=1), (rows[:, -1] > 0).astype(float)
        stratify = y if min((y == 0).sum(), (y == 1).sum()) > 2 else None
        train, test = train_test_split(
            np.arange(len(y)),
            train_size=0.66,
            test_size=1 - 0.66,
            random_state=43,
            stratify=stratify,
        )
        x = (x - x[train].mean(0)) / (x[train].std(0, ddof=1) + 1e-9)
        xs, ys = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
        made.append(((xs[train], ys[train]), (xs[test], ys[test])))
    return made


def accuracies(model: nn.Module, splits: list[Split]) -> tuple[float, float]:
    """Accuracy over all test rows, and its mean over hospitals."""
    each = [
        evaluate(model, Client("test", test).data, {"a": binary_accuracy})["a"]
        for _, test in splits
    ]
    sizes = [len(test[1]) for _, test in splits]
    pooled = sum(a * n for a, n in zip(each, sizes, strict=True)) / sum(sizes)
    return pooled, sum(each) / len(each)


def federated(splits: list[Split], strategy: FedAvg, lr: float, seed: int) -> tuple[float, float]:
    """One run."""
    torch.manual_seed(seed)
    clients = [Client(n, train) for n, (train, _) in zip(HOSPITALS, splits, strict=True)]
    recipe = Recipe(strategy, binary_cross_entropy, lr=lr, steps=100, batch_size=4)
    server = Server(nn.Linear(13, 1), clients, recipe, seed=seed)
    for _ in server.rounds(15):
        pass
    return accuracies(server.model, splits)


def pooled(splits: list[Split], seed: int) -> tuple[float, float]:
    """All training rows in one place: Adam, 50 epochs."""
    torch.manual_seed(seed)
    x, y = (torch.cat([train[i] for train, _ in splits]) for i in (0, 1))
    recipe = Recipe(
        loss=binary_cross_entropy,
        optimizer=ClientOptimizer("Adam"),
        lr=1e-3,
        epochs=50,
        batch_size=4,
    )
    server = Server(nn.Linear(13, 1), [Client("all", (x, y))], recipe, seed=seed)
    server.round()
    return accuracies(server.model, splits)


def main(folder: Path) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    splits = hospitals(folder)
    print("rows, train/test:", ", ".join(f"{len(a[1])}/{len(b[1])}" for a, b in splits))
    print("algorithm    pooled test (published)           mean of hospitals (published)")
    runs = {
        n: [federated(splits, s, lr, seed) for seed in range(42, 47)]
        for n, (s, lr, *_) in RUNS.items()
    }
    published = {n: (a, b) for n, (_, _, a, b) in RUNS.items()}
    runs["pooled"], published["pooled"] = (
        [pooled(splits, s) for s in range(42, 47)],
        (0.7953, 0.7353),
    )
    for name, found in runs.items():
        a, b = ([r[i] for r in found] for i in (0, 1))
        print(
            f"{name:<12} {statistics.mean(a):.4f} +- {statistics.stdev(a):.4f} ({published[name][0]:.4f})"
            f"          {statistics.mean(b):.4f} ({published[name][1]:.4f})"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
