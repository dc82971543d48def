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
from fedtorch.run.finetune import finetuned
from fedtorch.strategies import Ditto, FedDyn, FedNova
from fedtorch.training.evaluate import evaluate_clients
from fedtorch.training.losses import binary_accuracy, binary_cross_entropy

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
Split = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

# strategy, client learning rate, published accuracy: pooled test sets, mean over hospitals
RUNS = {
    "FedAvg": (FedAvg(), 1e-3, 0.7480, 0.6850),
    "FedProx": (FedProx(mu=0.01), 1e-3, 0.7480, 0.6850),
    "SCAFFOLD": (Scaffold(server=ServerSGD(lr=1.0)), 1e-3, 0.7480, 0.6840),
    "FedNova": (FedNova(), 1e-3, None, None),
    "FedDyn": (FedDyn(alpha=0.1), 1e-3, None, None),
    "FedAdam": (FedAvg(server=ServerAdam(lr=1e-2, tau=1e-8, beta2=0.999)), 1e-2, 0.7787, 0.7255),
    "FedAdagrad": (FedAvg(server=ServerAdagrad(lr=0.316228, tau=1e-8)), 3.162e-3, 0.7787, 0.7314),
    "FedYogi": (
        FedAvg(server=ServerYogi(lr=1e-2, tau=1e-8, beta2=0.999)),
        3.162e-3,
        0.7787,
        0.7314,
    ),
}


def table(path: Path) -> np.ndarray:
    """Rows without missing values; columns 10, 11, 12 are mostly missing outside Cleveland."""
    rows = [line.replace("?", "nan").split(",") for line in path.read_text().split()]
    values = np.delete(np.array(rows, dtype=float), [10, 11, 12], axis=1)
    return values[~np.isnan(values).any(1)]


def hospitals(folder: Path) -> tuple[list[Split], Split]:
    """Train and test (x, y) of each hospital, scaled by its own training rows, and of all together.

    The pooled rows are scaled by the pooled training rows: that is what the published pooled figures
    turn out to be measured on, also for models trained on rows scaled hospital by hospital.
    """
    tables = [table(folder / f"processed.{name}.data") for name in HOSPITALS]
    pooled = np.concatenate(tables)
    levels = {c: np.unique(pooled[:, c])[1:] for c in (2, 6)}
    parts = []
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
        parts.append((x[train], y[train], x[test], y[test]))
    together = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return [scaled(*p) for p in parts], scaled(*together)


def scaled(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Split:
    """Features scaled by the mean and standard deviation of the training rows."""
    mean, std = x.mean(0), x.std(0, ddof=1) + 1e-9
    values = ((x - mean) / std, y, (x_test - mean) / std, y_test)
    a, b, c, d = (torch.tensor(v, dtype=torch.float32) for v in values)
    return (a, b), (c, d)


def accuracies(model: nn.Module, splits: list[Split], pooled: Split) -> tuple[float, float]:
    """Accuracy over the pooled test rows, and its mean over hospitals."""
    each = [
        evaluate(model, Client("test", test).data, {"a": binary_accuracy})["a"]
        for _, test in (pooled, *splits)
    ]
    return each[0], sum(each[1:]) / len(splits)


def train(clients: list[Client], recipe: Recipe, rounds: int, seed: int) -> nn.Module:
    """One run."""
    torch.manual_seed(seed)
    server = Server(nn.Linear(13, 1), clients, recipe, seed=seed)
    for _ in server.rounds(rounds):
        pass
    return server.model


def personal(clients: list[Client], splits: list[Split], seed: int) -> dict[str, float]:
    """Mean over hospitals of each one's own model on its own test rows, at FLamby's rate."""
    found = {}
    for name, strategy in {"fine-tuned": FedAvg(), "Ditto": Ditto(lam=1.0)}.items():
        torch.manual_seed(seed)
        recipe = Recipe(strategy, loss=binary_cross_entropy, lr=3.16227e-3, steps=100, batch_size=4)
        server = Server(nn.Linear(13, 1), clients, recipe, seed=seed)
        for _ in server.rounds(15):
            pass
        own = finetuned(server, clients, 100) if name == "fine-tuned" else server.own()
        tests = [Client(n, train, test) for n, (train, test) in zip(HOSPITALS, splits, strict=True)]
        score = {"a": binary_accuracy}
        kinds = {"shared, before": {}, name: own} if name == "fine-tuned" else {name: own}
        for kind, models in kinds.items():
            each = evaluate_clients(server.model, tests, score, models)
            found[kind] = statistics.mean(s["a"] for s in each.values())
    return found


PERSONAL = {"shared, before": 0.7178, "fine-tuned": 0.7351, "Ditto": None}
"""Published by FLamby, mean over hospitals."""


def main(folder: Path) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    splits, pooled = hospitals(folder)
    print("rows, train/test:", ", ".join(f"{len(a[1])}/{len(b[1])}" for a, b in splits))
    clients = [Client(n, rows) for n, (rows, _) in zip(HOSPITALS, splits, strict=True)]
    adam = Recipe(
        loss=binary_cross_entropy,
        optimizer=ClientOptimizer("Adam"),
        lr=1e-3,
        epochs=50,
        batch_size=4,
    )
    jobs = {"pooled": ([Client("all", pooled[0])], adam, 1)}
    published = {"pooled": (0.7953, 0.7353)}
    for name, (strategy, lr, *figures) in RUNS.items():
        recipe = Recipe(strategy, loss=binary_cross_entropy, lr=lr, steps=100, batch_size=4)
        jobs[name], published[name] = (clients, recipe, 15), tuple(figures)
    print("algorithm    pooled test (published)           mean of hospitals (published)")
    for name, job in jobs.items():
        found = [accuracies(train(*job, seed), splits, pooled) for seed in range(42, 47)]
        whole, mean = ([r[i] for r in found] for i in (0, 1))
        print(
            f"{name:<12} {statistics.mean(whole):.4f} +- {statistics.stdev(whole):.4f} "
            f"({shown(published[name][0])})          {statistics.mean(mean):.4f} "
            f"({shown(published[name][1])})",
            flush=True,
        )
    print("each hospital's own model on its own rows (published)")
    every = [personal(clients, splits, seed) for seed in range(42, 47)]
    for name, known in PERSONAL.items():
        own = [found[name] for found in every]
        spread = f"{statistics.mean(own):.4f} +- {statistics.stdev(own):.4f}"
        print(f"{name:<14} {spread} ({shown(known)})", flush=True)


def shown(figure: float | None) -> str:
    """A published figure, or - where there is none."""
    return "-" if figure is None else f"{figure:.4f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
