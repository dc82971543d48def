"""How good a model is on data: the same loss and metrics, averaged over examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.batches import fetch, length
from fedtorch.client import Client
from fedtorch.losses import Loss, reduce
from fedtorch.modules import channels_last
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
    laid: bool | None = None
    total = dict.fromkeys(metrics, 0.0)
    was_training = model.training
    model.eval()
    with torch.no_grad(), seeds.seeded(0):
        for index in torch.arange(n).split(batch_size or n):
            x, y = to(fetch(data, index), device)  # a copy: a model may write on what it is given
            if laid is None:
                laid = convolves(model, x)
            output = forward(model, channels_last(x) if laid else x)
            for name, metric in metrics.items():
                total[name] += float(reduce(metric(output, y)).double().mean()) * len(index)
    model.train(was_training)
    return {name: value / n for name, value in total.items()}


def convolves(model: nn.Module, x: Any) -> bool:
    """Whether these are images that the model takes in channels-last memory, tried on two of them."""
    if not (isinstance(x, Tensor) and x.dim() == 4 and x.device.type == "cpu"):
        return False
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return False
    try:
        few = [x[:2].clone(), x[:2].clone()]  # a model may write on what it is given
        wanted, got = forward(model, few[0]), forward(model, channels_last(few[1]))
    except RuntimeError:  # a view of what is no longer one block of memory
        return False
    return isinstance(got, Tensor) and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def evaluate_clients(
    model: nn.Module, clients: Sequence[Client], metrics: Mapping[str, Loss]
) -> dict[str, dict[str, float]]:
    """The global model on each client's own validation data, by client id."""
    return {
        c.id: evaluate(model, c.validation, metrics) for c in clients if c.validation is not None
    }
