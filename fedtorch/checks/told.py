"""Whether figures inside the budget can be had of a model and loss, tried on made-up examples."""

from collections.abc import Sequence

import torch
from torch import nn

from fedtorch import seeds
from fedtorch.checks.tried import first, largest, two_examples
from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.module import to
from fedtorch.training.outline import untouched
from fedtorch.training.told import halves
from fedtorch.types import ConfigError


def try_figures(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> None:
    """Raises ConfigError where they fail, or an example's own are not its own in evaluation."""
    plan = recipe.privacy
    if not plan.metrics_epsilon:
        return
    data, device = largest(clients), next(model.parameters()).device
    ends = (torch.tensor([0]), torch.tensor([len_of(data) - 1]))
    with untouched(model), seeds.seeded(0):
        model.eval()
        try:
            both = halves(model, to(two_examples(data), device), 2, recipe)
            each = [halves(model, to(fetch(data, k), device), 1, recipe) for k in ends]
        except ConfigError:
            raise
        except Exception as e:
            raise ConfigError(
                f"privacy.metrics_epsilon: the model or its loss fails in evaluation: {first(e)}; leave "
                "metrics_epsilon out"
            ) from e
    alone = plan.per_example is not None and plan.per_example.mode == "alone"
    if plan.per_example and not alone and not torch.allclose(torch.cat(each), both, atol=1e-4):
        raise ConfigError(
            "privacy.metrics_epsilon: in evaluation the model or its loss mixes the examples of a batch, "
            "so that one moves the figures of others; leave metrics_epsilon out, or take privacy.mode alone"
        )
