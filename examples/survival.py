"""A loss over the whole batch: Cox's partial likelihood, for survival times with censoring.

The likelihood compares each patient who had an event with everyone still at risk then, so it is no sum over
patients. A loss that returns one number for the batch is used as it is. From the command line:

    fedtorch train --dataset npz --dataset.path trial.npz --model logistic --model.num-outputs 1
        --loss examples.survival:cox --metrics examples.survival:concordance --batch-size null
"""

import torch
from torch import Tensor, nn

from fedtorch import Client, Recipe, Server, evaluate


def cox(output: Tensor, target: Tensor) -> Tensor:
    """Negative log partial likelihood per event (Cox 1972).

    Output [B, 1] log risk; target [B, 2] time and whether there was an event.
    """
    order = target[:, 0].argsort(descending=True)
    risk, event = output[order, 0], target[order, 1]
    at_risk = risk.logcumsumexp(0)  # everyone whose time is at least this patient's
    return ((at_risk - risk) * event).sum() / event.sum().clamp(min=1)


def concordance(output: Tensor, target: Tensor) -> Tensor:
    """Share of comparable pairs in which the one with the earlier event has the higher risk."""
    time, event = target.T
    comparable = (time[:, None] < time) & (event[:, None] > 0)
    return (output > output.T)[comparable].float().mean()


def patients(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Exponential survival times with hazard exp(x . beta), a third of them censored."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    hazard = (x @ torch.tensor([1.0, -0.5, 0.0])).exp()
    time = -torch.rand(n, generator=generator).clamp(min=1e-6).log() / hazard
    event = (torch.rand(n, generator=generator) < 2 / 3).float()
    return x, torch.stack([time, event], 1)


def train(rounds: int = 20) -> tuple[nn.Module, float]:
    """Four hospitals of unequal size; the model and its concordance on new patients."""
    clients = [Client(f"hospital {k}", patients(60 + 40 * k, seed=k)) for k in range(4)]
    model = nn.Linear(3, 1)
    recipe = Recipe(loss=cox, lr=0.3, steps=3, batch_size=None)
    for figures in Server(model, clients, recipe).rounds(rounds):
        print(f"round {figures['round']:>2}  loss {figures['train_loss']:.3f}")
    held = Client("held out", patients(400, seed=99)).data
    return model, evaluate(model, held, {"c": concordance}, batch_size=None)["c"]


if __name__ == "__main__":
    model, c = train()
    print(f"coefficients {model.weight[0].tolist()}  concordance {c:.3f}")
