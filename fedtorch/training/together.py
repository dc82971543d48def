"""Visits to several models in one call, where a step of the server is made of such (``rounds.buffered``).

Apart each model would have layers, a sum and norms of its own, which cost a small network more than its
training. What comes of it is one sum, as of clients that were all sent the same.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.local_update import figures_of, orders
from fedtorch.training.module import to_device
from fedtorch.training.results import Results
from fedtorch.training.sequential import naming_client
from fedtorch.types import Failure, Params, Raw, Released, Tasks


class Joins(Protocol):
    """A solver that can."""

    def joins(self, recipe: Recipe) -> bool:
        """Whether it trains clients that were sent different models in one call, by such a recipe."""

    def together(
        self,
        datasets: Sequence[Dataset],
        plans: Sequence[Tensor],
        given: tuple[Sequence[Params], Sequence[int]],
        rates: Tensor,
        recipe: Recipe,
    ) -> Results:
        """Train K clients by steps of their ``rates`` [K]; ``given``: models, and whose is which, [K]."""


def local_updates(
    visits: Sequence[tuple[Client, int]],
    sent: Tasks,
    recipe: Recipe,
    model: nn.Module,
    solve: Joins,
) -> tuple[Released, list[Failure]]:
    """Train clients, each by the task of its place in ``sent``, and return the mean of what they send.

    As ``local_update``; the client with most steps comes first, and one may come twice.
    """
    ids, of = [c.id for c, _ in visits], [n for _, n in visits]
    used = sorted({*of})
    tasks = {n: to_device(sent.each[n], model) for n in used}
    # which examples each client sees in which step
    plans: list[Tensor] = [torch.empty(0)] * len(visits)
    for n, task in tasks.items():
        places = [k for k, m in enumerate(of) if m == n]
        found = orders([visits[k][0] for k in places], recipe, task)
        for k, plan in zip(places, found, strict=True):
            plans[k] = plan
    # local steps
    clients, last = [c for c, _ in visits], tasks[used[-1]]
    rates = torch.tensor([tasks[n].lr for n in of], dtype=torch.float64)
    given = [tasks[n].state for n in used], [used.index(n) for n in of]
    with naming_client(ids, last):
        trained = solve.together([c.data for c in clients], plans, given, rates, recipe)
    # what may leave the clients
    factors = torch.tensor([sent.factors[n] for n in of], dtype=torch.float64)
    examples, figures = figures_of(clients, plans, trained)
    raw = Raw(
        tuple(ids), examples, recipe.weights(examples), figures, trained, None, None,
        measured=lambda norms: (factors, {}),
    )  # fmt: skip
    released, good = recipe.privacy.release(raw, last)
    lost = [i for i, fine in zip(ids, good.tolist(), strict=True) if not fine]
    return released, [Failure(i, "nonfinite", "its update is not finite") for i in lost]
