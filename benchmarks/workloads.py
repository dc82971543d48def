"""The five workloads every speed claim is about, and the data they train on.

W1 and W2 are the two models of the FedAvg paper (McMahan et al. 2017, arXiv:1602.05629, sec. 3) on ten
clients; W3 is W1 with sample-level and W4 a larger W1 with client-level differential privacy, W5 is W2
with sample-level privacy.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.data import Digits, Idx
from fedtorch.data.base import Data
from fedtorch.recipe import Recipe
from fedtorch.run.zoo import find
from fedtorch.training.batches import batch_order

MNIST = Path("../shared/data/mnist")
EXAMPLES = 60
"""Training examples of each client."""


@dataclass(frozen=True)
class Workload:
    """What to train, and how much of it counts as one measurement."""

    name: str
    model: str
    clients: int
    rounds: int
    privacy: str = "none"
    """none, sample (clip 1, noise 1, every local step) or client (clip 1, noise 1, once a round)."""
    hidden: int | None = None
    """Width of the hidden layers; none: the paper's."""
    batch_size: int = 10
    lr: float = 0.1
    eval_every: int = 10
    epochs: int = 1
    """Passes over a client's data in each round; private steps are six, whatever it says."""


WORKLOADS = {
    "w1": Workload("w1", "mlp", clients=10, rounds=50),
    "w2": Workload("w2", "cnn", clients=10, rounds=10),
    "w3": Workload("w3", "mlp", clients=10, rounds=20, privacy="sample"),
    "w4": Workload("w4", "mlp", clients=100, rounds=10, privacy="client"),
    "w5": Workload("w5", "cnn", clients=10, rounds=5, privacy="sample"),
}


@dataclass(frozen=True)
class Problem:
    """A workload with its data: everything a contestant needs, the same for all."""

    work: Workload
    shards: list[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]
    facts: dict[str, object]
    seed: int = 0
    """Decides data, initial weights and the order of the batches."""
    noise: float = 1.0
    """Noise multiplier where the workload is private."""

    def model(self) -> nn.Module:
        """The model with the same initial weights for everyone."""
        facts = self.facts | ({"hidden": self.work.hidden} if self.work.hidden else {})
        keys = (
            ("input_shape", "num_outputs")
            if self.work.model == "cnn"
            else ("in_features", "num_outputs")
        )
        with seeds.seeded(self.seed + 1):
            return find(self.work.model)(**{k: facts[k] for k in (*keys, "hidden") if k in facts})

    def recipe(self) -> Recipe:
        """How clients train."""
        return Recipe(lr=self.work.lr, batch_size=self.work.batch_size, epochs=self.work.epochs)

    def order(self, round: int, client: int) -> Tensor:
        """The shuffled batches fedtorch would draw, so that everyone steps through the same ones."""
        return batch_order(
            EXAMPLES, self.recipe(), seeds.derive(self.seed, "order", round, str(client))
        )

    def orders(self) -> list[list[Tensor]]:
        """Of every round and client, drawn beforehand: shuffling is on the house, for all peers."""
        clients = range(self.work.clients)
        return [[self.order(r, k).flatten() for k in clients] for r in range(self.work.rounds + 1)]


def data(mnist: Path) -> Data:
    """MNIST where its files are, else scikit-learn's digits."""
    return Idx(str(mnist)).load(0) if mnist.is_dir() else Digits().load(0)


def problem(work: Workload, mnist: Path = MNIST, seed: int = 0, noise: float = 1.0) -> Problem:
    """Sixty examples a client with Dirichlet(0.5) label skew; clients may share examples."""
    loaded = data(mnist)
    (x, y), test = loaded.train.tensors, loaded.test.tensors  # type: ignore[attr-defined]
    rng = np.random.default_rng(seed)
    by_class = [np.flatnonzero(y.numpy() == c) for c in range(loaded.outputs)]
    shards = []
    for _ in range(work.clients):
        counts = rng.multinomial(EXAMPLES, rng.dirichlet(np.full(loaded.outputs, 0.5)))
        index = np.concatenate([rng.choice(by_class[c], n) for c, n in enumerate(counts)])
        index = torch.from_numpy(rng.permutation(index))
        shards.append((x[index].contiguous(), y[index]))
    return Problem(work, shards, test, loaded.facts, seed, noise)
