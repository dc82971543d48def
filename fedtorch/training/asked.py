"""Losses and gradients that a strategy asks of clients' data, beside their local steps.

Through the module itself, one client after another, whatever solver trains: they come out alike on all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.client import Client
from fedtorch.privacy.canaries import Watch
from fedtorch.recipe import Recipe
from fedtorch.training.batches import fetch, in_order
from fedtorch.training.module import to, training
from fedtorch.training.outline import Outline
from fedtorch.training.reserve import Reserve
from fedtorch.training.sequential import naming_client
from fedtorch.training.step import Stepping
from fedtorch.tree import row
from fedtorch.types import Params, Stack, Task, altered

MOST = 512
"""Examples in one batch, where all are asked for and the run's batches are no larger."""


@dataclass(frozen=True)
class ClientsData:
    """``Data`` of K clients in one visit."""

    clients: Sequence[Client]
    order: Sequence[Tensor]
    """Which examples each takes in which step."""
    task: Task
    recipe: Recipe
    model: nn.Module
    """It is left as it was."""
    own: Stack
    """What clients keep, as the visit starts from it, [K, ...]."""
    known: dict[str, Tensor] = field(default_factory=dict)
    """Losses at the weights that the visit starts from, by client."""
    watches: Mapping[str, Watch] = field(default_factory=dict)
    """Canaries of an audit among the clients' examples, by client."""
    reserve: Reserve = field(default_factory=Reserve)
    """Where sums of changes may lie."""
    turns: Iterator[int] = field(default_factory=count)
    """Numbers of the calls: no two drop alike."""

    def loss(self, at: Stack | None = None) -> Tensor:
        """One pass over all examples, forward alone."""
        found = []
        with self._trying() as visiting:
            self.model.eval()
            for k, client in enumerate(self.clients):
                value = self.known.get(client.id) if at is None else None
                if value is None:
                    with visiting(k):
                        value = self._walk(self._batches(k), len(client), *self._weights(k, at))
                if at is None:
                    self.known[client.id] = value
                found.append(value)
        return torch.stack(found)

    def grad(self, at: Stack | None = None, step: int | None = None) -> tuple[Stack, Tensor]:
        """Autograd, a batch at a time."""
        turn, grads, losses = next(self.turns), list[Params](), list[Tensor]()
        draw_seed = self.recipe.privacy.draw_seed
        with self._trying() as visiting, seeds.kept():
            training(self.model)
            for k, client in enumerate(self.clients):
                params, rest = self._weights(k, at)
                for p in params.values():
                    p.requires_grad_()
                seeds.set_global(seeds.derive(draw_seed(self.task, client.id), "asked", turn))
                with visiting(k):
                    batches = self._batches(k, step)
                    many = len(client) if step is None else sum(n for n, _ in batches)
                    losses.append(self._walk(batches, many, params, rest))
                zero = torch.zeros_like
                grads.append({n: zero(p) if p.grad is None else p.grad for n, p in params.items()})
        return {n: torch.stack([g[n] for g in grads]) for n in grads[0]}, torch.stack(losses)

    def among(self, places: Sequence[int]) -> "ClientsData":
        """What is known of them stays known."""
        clients, order = [self.clients[k] for k in places], [self.order[k] for k in places]
        own = {n: v[[*places]] for n, v in self.own.items()}
        return altered(self, clients=clients, order=order, own=own)

    def _batches(self, k: int, step: int | None = None) -> Iterable[tuple[int, Any]]:
        """Examples of each batch, and the batch."""
        data, plan = self.clients[k].data, self.order[k]
        if step is None:
            found = in_order(data, max(MOST, self.recipe.batch_size or 0))
            return ((len(index), batch) for index, batch in found)
        index = plan[step][plan[step] >= 0] if step < len(plan) else plan.new_empty(0)
        return [(len(index), fetch(data, index))] if len(index) else []

    def _weights(self, k: int, at: Stack | None) -> tuple[Params, Params]:
        """Those that are asked about, as leaves, and all else that the model takes."""
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        names = [n for n in trained if (n in at if at else n not in self.own)]
        given = {n: v[k if len(v) > 1 else 0] for n, v in (at or {}).items()}
        state = self.task.state | row(self.own, k) | given
        params = {n: state.pop(n).detach() for n in names}
        return params, {
            n: v.detach().clone() for n, v in state.items()
        }  # a forward writes on buffers

    def _walk(
        self, batches: Iterable[tuple[int, Any]], many: int, params: Params, rest: Params
    ) -> Tensor:
        """The mean loss, float64; its gradient goes where leaves ask for it."""
        stepping, total = Stepping(self.model, self.recipe.asked), torch.zeros(()).double()
        learns = any(p.requires_grad for p in params.values())
        device = next(self.model.parameters()).device
        for n, batch in batches:
            # a step of the user's own may take gradients itself
            with torch.set_grad_enabled(learns or self.recipe.step is not None):
                value = stepping.losses(params, rest, to(batch, device)).mean() * (n / many)
                if learns:
                    value.backward()
            total += value.detach().cpu().double()
        return total

    @contextmanager
    def _trying(self) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
        """One client's turn after another; what a module keeps beside its numbers goes to nobody else."""
        outline = Outline(self.model, own=True)
        modes = [(m, m.training) for m in self.model.modules()]

        @contextmanager
        def visiting(k: int) -> Iterator[None]:
            try:
                with naming_client([self.clients[k].id], self.task):
                    yield
            finally:
                outline.restore()

        try:
            yield visiting
        finally:
            for m, was in modes:
                m.training = was
