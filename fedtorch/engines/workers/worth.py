"""Whether a round is worth sharing out among workers, or done sooner in one process.

By rule and not by a stopwatch, so that a seed gives the same bits on a busy machine as on an idle one. The
numbers are rough: where they are wrong by half, either way costs about the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedtorch import seeds
from fedtorch.checks.precise import products
from fedtorch.checks.standins import shown
from fedtorch.client import Client
from fedtorch.engines.local import LocalSession
from fedtorch.recipe import Recipe
from fedtorch.training.batches import fetch, steps_of
from fedtorch.training.module import evaluating
from fedtorch.training.outline import untouched

SHARED = 20.0
"""Milliseconds of work below which sharing it out costs more than it saves (W1 takes 9, W4 90)."""

PRODUCTS = 40e6
"""Multiplications a millisecond."""

CALLS = 0.5
"""Milliseconds of a step of one client by itself that are no multiplications."""

NUMBERS = 200e3
"""Weights a millisecond that noise is added to."""


@dataclass(frozen=True)
class Worth:
    """What a visit takes of one core, about."""

    recipe: Recipe
    products: int
    """Multiplications of a forward of one example."""
    weights: int
    alone: bool
    """Whether clients are trained one after another."""

    @classmethod
    def of(cls, local: LocalSession) -> "Worth | None":
        """By the model and the way it is trained; None where it takes no single example in evaluation."""
        first = shown(local.model, [*local.clients.values()], local.recipe)[0]
        with seeds.kept(), untouched(local.model), evaluating(local.model):
            try:
                batch = fetch(first.data, torch.arange(1))
                found = products(local.model, batch, local.recipe)
            except Exception:  # whatever a model's own code may raise: the workers are asked then
                return None
        weights = sum(p.numel() for p in local.model.parameters() if p.requires_grad)
        return cls(local.recipe, found, weights, local.choice.group > 1 or local.choice.chunk == 1)

    def milliseconds(self, examples: int) -> float:
        """Of a client with so many examples."""
        plan, order = self.recipe.privacy.per_example, self.recipe
        steps = plan.steps if plan else steps_of(examples, order)
        size = min((order.batch_size or examples) * order.accumulate, examples)
        seen = steps * (plan.sample_rate * examples if plan else size)
        noised = steps * self.weights if plan else 0
        backward = 3 * seen * self.products / PRODUCTS
        return backward + self.alone * steps * CALLS + noised / NUMBERS

    def pays(self, clients: Sequence[Client]) -> bool:
        """Whether a round of these is worth sharing out."""
        found = 0.0
        for client in clients:  # the first few tell, of however many
            found += self.milliseconds(len(client))
            if found >= SHARED:
                return True
        return False

    def said(self, clients: Sequence[Client], workers: int) -> tuple[str, ...]:
        """In one line, which rounds are not; nothing where a round of one client is."""
        whole = sum(self.milliseconds(len(c)) for c in clients)
        least = math.ceil(SHARED / (whole / len(clients))) if whole else len(clients) + 1
        if least <= 1:
            return ()
        which = f"rounds of fewer than {least:,} clients" if least <= len(clients) else "rounds"
        visit = f"{whole / len(clients):.2g} ms"
        return (
            f"{which} stay in one process: a visit takes about {visit}, and to hand them to {workers} "
            "workers takes longer than it saves (--engine.chunk N shares them out all the same)",
        )
