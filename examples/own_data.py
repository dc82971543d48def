"""A Dataset of one's own with augmentation, and a strategy of one's own.

Random crops, flips and the like draw from the global generators of torch, NumPy and Python. fedtorch seeds
them for each visit to a client and puts them back, so that a run with augmentation repeats bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch import Client, Recipe, Server, Strategy, evaluate
from fedtorch.data import Digits, Iid, partition
from fedtorch.training.losses import accuracy
from fedtorch.tree import tmap
from fedtorch.types import Params


class Shifted(Dataset):
    """Images moved by up to one pixel, another way each time they are looked at."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Keep the originals."""
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """One shifted image and its label."""
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return self.images[i].roll((down, right), (1, 2)), self.labels[i]


@dataclass(frozen=True)
class Damped(Strategy):
    """FedAvg that goes only part of the way to the clients' mean."""

    share: float = 0.8

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """What the server adds to the weights."""
        return tmap(lambda d: self.share * d, mean["delta"]), extras


def train(rounds: int = 5) -> tuple[nn.Module, float]:
    """A model and its accuracy on unshifted test images."""
    data = Digits().load(seed=0)
    images, labels = data.train.tensors
    ids, parts = partition(data, Iid(), clients=5, seed=0)
    clients = [Client(i, Shifted(images[p], labels[p])) for i, p in zip(ids, parts, strict=True)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    server = Server(model, clients, Recipe(Damped(share=0.8), lr=0.3, epochs=2, batch_size=16))
    for figures in server.rounds(rounds):
        print(f"round {figures['round']}  train loss {figures['train_loss']:.3f}")
    return model, evaluate(model, data.test, {"accuracy": accuracy})["accuracy"]


if __name__ == "__main__":
    print(f"test accuracy {train()[1]:.3f}")
