"""What an update and a model give away of the examples behind them, and what privacy leaves of it.

    python examples/attacks_show.py [PNG]

First images of handwritten digits, divided out of what clients send: exact without privacy, noise with it.
Then LiRA on a model that has learned its examples by heart, and on one trained under privacy: how many
members it finds at one false alarm in a hundred.
"""

import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fedtorch import Client, Recipe
from fedtorch.attacks.gradient import invert
from fedtorch.attacks.membership import MembershipAttack, Train, infer
from fedtorch.attacks.seen import seen
from fedtorch.data import Digits
from fedtorch.privacy import Nothing, Privacy, SampleLevel
from fedtorch.run.attacked import gradient_picture

EXAMPLES, INPUTS, SHADOWS = 100, 100, 12
PRIVATE = SampleLevel(epsilon=8.0, rounds=1, steps=20, sample_rate=0.2, batch_size=10)


def gradients(path: str) -> None:
    """Ten clients' digits, out of one step."""
    data = Digits().load(0).train
    clients = [Client(f"client {k}", Subset(data, [k])) for k in range(10)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    found = invert(model, clients, Recipe())
    Path(path).write_bytes(gradient_picture(found))
    for view in found.views:
        print(f"{view.name:8} {view.middle:6.1f} dB, seen by {view.who}")


def drawn(n: int, seed: int) -> TensorDataset:
    """Points of two classes that hardly differ, so that who is right on all of them knows them by heart."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=draw)
    return TensorDataset(torch.randn(n, INPUTS, generator=draw) + 0.1 * y[:, None], y)


def trains(data: TensorDataset, plan: Privacy) -> Train:
    """Trains models on some of the examples: each is what the server sees of one client."""

    def train(inside: np.ndarray, seed: int) -> Iterator[nn.Module]:
        halves = [[int(n) for n in np.flatnonzero(row)] for row in inside]
        clients = [Client(str(k), Subset(data, half)) for k, half in enumerate(halves)]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh(), nn.Linear(32, 2))
        recipe = Recipe(privacy=plan, lr=None if plan.claims else 0.3, epochs=20)
        for update in seen(model, clients, recipe, seed):
            made = deepcopy(model)
            made.load_state_dict({k: v + update[k] for k, v in model.state_dict().items()})
            yield made

    return train


def membership() -> None:
    """Members found, without and with privacy."""
    data, test = drawn(EXAMPLES, 1), drawn(300, 2)
    for name, plan in (("plain", Nothing()), ("private", PRIVATE)):
        found = infer(
            trains(data, plan), data, test, "classification", MembershipAttack(shadows=SHADOWS)
        )
        lira = found.rates["LiRA"]
        print(
            f"{name:8} LiRA finds {lira.found():.3f} of members at 1 % false alarms, AUC {lira.auc:.3f}"
        )


if __name__ == "__main__":
    gradients(sys.argv[1] if sys.argv[1:] else "attacks_show.png")
    membership()
