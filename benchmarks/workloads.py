"""The workloads every speed claim is about, and the data they train on.

W1 and W2 are the two models of the FedAvg paper (McMahan et al. 2017, arXiv:1602.05629, sec. 3) on ten
clients; W3 is W1 with sample-level and W4 a larger W1 with client-level differential privacy, W5 is W2
with sample-level privacy. W6 to W10 are networks that people train (``benchmarks.networks``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.data import Digits, Idx, Text
from fedtorch.data.base import Data, from_tensors
from fedtorch.recipe import Recipe
from fedtorch.run import zoo
from fedtorch.training.batches import batch_order

MNIST = Path("../shared/data/mnist")


@dataclass(frozen=True)
class Workload:
    """What to train, and how much of it counts as one measurement."""

    name: str
    model: str
    clients: int
    rounds: int
    data: str = "images"
    """images, text (windows of 80 characters) or table (made up)."""
    examples: int = 60
    """Of each client."""
    privacy: str = "none"
    """none, sample (clip 1, noise 1, every local step) or client (clip 1, noise 1, once a round)."""
    hidden: int | None = None
    """Width of the hidden layers; none: the paper's."""
    batch_size: int = 10
    lr: float = 0.1
    eval_every: int = 10
    """Rounds; 0: in the end alone, which is not timed, and on 200 examples."""
    epochs: int = 1
    """Passes over a client's data in each round; private steps are six, whatever it says."""


NETWORKS = "benchmarks.networks:"
REAL = (
    Workload("w6", "lstm", 10, 3, data="text", examples=64, batch_size=16, lr=1.0, eval_every=0),
    Workload("w7", "resnet", 10, 3, eval_every=0),
    Workload(
        "w8", f"{NETWORKS}transformer", 4, 3, data="text", examples=24, batch_size=8, eval_every=0
    ),
    Workload(
        "w8-lora", f"{NETWORKS}adapted", 4, 3, data="text", examples=24, batch_size=8, eval_every=0
    ),
    Workload("w9", "logistic", 1000, 3, data="table", examples=50, eval_every=0),
    Workload("w10", f"{NETWORKS}ResNet18", 2, 2, examples=40, batch_size=20, lr=0.05, eval_every=0),
)
"""Plain. Of the private ones the LSTM has 3 clients and the table 200, as Opacus needs its time."""
FEWER = {"w6": 3, "w9": 200}
WORKLOADS = {
    "w1": Workload("w1", "mlp", clients=10, rounds=50),
    "w2": Workload("w2", "cnn", clients=10, rounds=10),
    "w3": Workload("w3", "mlp", clients=10, rounds=20, privacy="sample"),
    "w4": Workload("w4", "mlp", clients=100, rounds=10, privacy="client"),
    "w5": Workload("w5", "cnn", clients=10, rounds=5, privacy="sample"),
    **{w.name: w for w in REAL},
    **{
        f"{w.name}-private": replace(
            w, name=f"{w.name}-private", privacy="sample", clients=FEWER.get(w.name, w.clients)
        )
        for w in REAL[:-1]  # BatchNorm mixes examples
    },
}


@dataclass(frozen=True)
class Problem:
    """A workload with its data: everything a contestant needs, the same for all."""

    work: Workload
    shards: list[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]
    facts: Mapping[str, Any]
    seed: int = 0
    """Decides data, initial weights and the order of the batches."""
    noise: float = 1.0
    """Noise multiplier where the workload is private."""

    def model(self) -> nn.Module:
        """The model with the same initial weights for everyone."""
        args = {"hidden": self.work.hidden} if self.work.hidden else {}
        with seeds.seeded(self.seed + 1):
            return zoo.build(self.work.model, self.facts, args)

    def recipe(self) -> Recipe:
        """How clients train."""
        return Recipe(lr=self.work.lr, batch_size=self.work.batch_size, epochs=self.work.epochs)

    def order(self, round: int, client: int) -> Tensor:
        """The shuffled batches fedtorch would draw, so that everyone steps through the same ones."""
        return batch_order(
            self.work.examples, self.recipe(), seeds.derive(self.seed, "order", round, str(client))
        )

    def orders(self) -> list[list[Tensor]]:
        """Of every round and client, drawn beforehand: shuffling is on the house, for all peers."""
        clients = range(self.work.clients)
        return [[self.order(r, k).flatten() for k in clients] for r in range(self.work.rounds + 1)]


def data(mnist: Path, kind: str = "images") -> Data:
    """MNIST where its files are, else scikit-learn's digits; the text beside them, else made up."""
    if kind == "images":
        return Idx(str(mnist)).load(0) if mnist.is_dir() else Digits().load(0)
    text = mnist.parent / "tinyshakespeare.txt"
    if kind == "text" and text.is_file():
        return Text(str(text)).load(0)
    g, n = torch.Generator().manual_seed(0), 50_200
    if kind == "text":
        x = torch.randint(65, (2000, 81), generator=g)
        facts = {"vocab_size": 65, "input_shape": (80,)}
        return from_tensors("made up", halves(x), halves(x[:200]), "classification", 65, **facts)
    x = torch.randn(n, 30, generator=g)
    y = (x @ torch.randn(30, generator=g) + torch.randn(n, generator=g) > 0).long()
    known, held = (x[200:], y[200:]), (x[:200], y[:200])
    return from_tensors("made up", known, held, "classification", 2)


def halves(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Characters, and each one's next."""
    return windows[:, :-1], windows[:, 1:]


def problem(work: Workload, mnist: Path = MNIST, seed: int = 0, noise: float = 1.0) -> Problem:
    """Images with Dirichlet(0.5) label skew, other examples by chance; clients may share some."""
    loaded = data(mnist, work.data)
    (x, y), test = loaded.train.tensors, loaded.test.tensors  # type: ignore[attr-defined]
    rng = np.random.default_rng(seed)
    shards = []
    for _ in range(work.clients):
        if work.data == "images":
            index = skewed(y, loaded.outputs, work.examples, rng)
        else:
            index = rng.choice(len(x), work.examples, replace=False)
        index = torch.from_numpy(rng.permutation(index))
        shards.append((x[index].contiguous(), y[index].contiguous()))
    test = test if work.eval_every else tuple(t[:200].contiguous() for t in test)
    return Problem(work, shards, test, loaded.facts, seed, noise)


def skewed(y: Tensor, classes: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Places of ``n`` examples whose classes are unequally many."""
    by_class = [np.flatnonzero(y.numpy() == c) for c in range(classes)]
    counts = rng.multinomial(n, rng.dirichlet(np.full(classes, 0.5)))
    return np.concatenate([rng.choice(by_class[c], m) for c, m in enumerate(counts)])
