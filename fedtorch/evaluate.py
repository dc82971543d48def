"""How good a model is on data: the same loss and metrics, averaged over examples."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.batches import fetch, length
from fedtorch.client import Client
from fedtorch.losses import Loss, reduce
from fedtorch.solvers import forward, to


def evaluate(
    model: nn.Module,
    data: Dataset,
    metrics: Mapping[str, Loss],
    batch_size: int | None = 512,
) -> dict[str, float]:
    """Mean of each metric over ``data``, in eval mode; the model's mode is put back.

    A metric that returns a scalar for a batch is averaged by batch size; give ``batch_size=None`` for
    one that needs all examples at once (AUC, concordance).
    """
    n = length(data)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = dict.fromkeys(metrics, 0.0)
    was_training = model.training
    model.eval()
    with torch.no_grad(), seeds.seeded(0):
        for index in torch.arange(n).split(batch_size or n):
            x, y = to(fetch(data, index), device)
            output = forward(model, x)
            for name, metric in metrics.items():
                total[name] += float(reduce(metric(output, y)).double().mean()) * len(index)
    model.train(was_training)
    return {name: value / n for name, value in total.items()}


def evaluate_clients(
    model: nn.Module, clients: Sequence[Client], metrics: Mapping[str, Loss]
) -> dict[str, dict[str, float]]:
    """The global model on each client's own validation data, by client id."""
    return {
        c.id: evaluate(model, c.validation, metrics) for c in clients if c.validation is not None
    }
