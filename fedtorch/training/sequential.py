"""Clients one after another through one module, summed as they come: the general path for many clients.

What a visit costs beside its steps is paid once for all of them, and K updates are never held at once.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.client import Client, Recipe
from fedtorch.privacy import SampleLevel
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.training.module import to
from fedtorch.training.reduced import averages, shrunk
from fedtorch.training.trainee import Working
from fedtorch.tree import add_weighted, expand, moving, near, settled, split
from fedtorch.types import ClientError, Context, Params, Stack, Task


class Total:
    """The weighted sum of changes of a model, and the latest change, all flat and in float64.

    Float64, because there the change of a float32 weight is exact. In place, because fresh memory costs
    as much as the arithmetic.
    """

    def __init__(self, start: Params) -> None:
        """``start``: the weights that changes are counted from."""
        device = next(iter(start.values())).device
        count = sum(v.numel() for v in start.values())
        self._start = torch.empty(count, dtype=torch.float64, device=device)
        self._change = torch.empty_like(self._start)
        self._sum = torch.empty_like(self._start)
        self._empty = True
        self._shapes = {k: v.shape for k, v in start.items()}
        self._pieces = [*split(self._change, self._shapes).values()]
        torch._foreach_copy_([*split(self._start, self._shapes).values()], [*start.values()])

    def see(self, weights: Params) -> float:
        """Take the change of ``weights``, in the order of ``start``; its squared norm."""
        torch._foreach_copy_(self._pieces, [*weights.values()])
        self._change.sub_(self._start)
        return float(self._change.dot(self._change))

    def add(self, weight: float) -> None:
        """Add ``weight`` times the latest change."""
        if self._empty:
            torch.mul(self._change, weight, out=self._sum)
            self._empty = False
        else:
            self._sum.add_(self._change, alpha=weight)

    def params(self, factor: float) -> Params:
        """``factor`` times the sum."""
        if self._empty:
            self._sum.zero_()
        return split(self._sum if factor == 1 else self._sum * factor, self._shapes)

    def bound(self, sq_norms: Tensor) -> Tensor:
        """No less than the exact squares: a sum of n products errs by less than n 2^-53 of itself."""
        return sq_norms * (1 + (len(self._sum) + 8) * 2.0**-52)


@dataclass(frozen=True)
class Turns:
    """What is left of K visits: ``solvers.Implicit``, for the weights that it was summed with."""

    loss: Tensor
    """Mean training loss over the visit's steps, [K], on the CPU."""
    squares: Tensor
    """Squared norm of each change, [K], float64; NaN where it or a float buffer is not finite."""
    used: Tensor
    """What each change was multiplied by, [K]; 0: it is not in the sum."""
    total: Total
    floats: Params
    """The same sum of the float buffers that any client moved."""

    @property
    def buffers(self) -> Stack:
        """The weighted mean of the float buffers, one row."""
        return expand({k: v / self.used.sum() for k, v in self.floats.items()})

    def sq_norms(self, upper: bool = False) -> Tensor:
        """Squared norm of each change, [K]."""
        return self.total.bound(self.squares) if upper else self.squares

    def weighted_sum(self, weight: Tensor) -> Params:
        """The sum; ``weight`` may differ from the weights used by one factor for all, no more."""
        whole = float(self.used.sum())
        return self.total.params(float(weight.sum()) / whole if whole else 1.0)


def in_turn(
    clients: Sequence[Client],
    plans: Sequence[Tensor],
    task: Task,
    recipe: Recipe,
    model: nn.Module,
    private: PrivateSteps | None,
) -> Turns:
    """Train each client from the global weights as if it were alone, and sum what they learned.

    Only where ``averages(recipe)``: a sum does not show each client's update.
    """
    if not averages(recipe):
        raise ValueError("clients whose updates are needed one by one train one at a time")
    here = Working(model, task, recipe)
    start = {k: task.state[k] for k in here.params}
    total, floats = Total(near(start)), Params()
    anchor, extras = expand(start), {g: expand(e) for g, e in task.extras.items()}
    steps = torch.tensor([len(p) for p in plans])
    examples = torch.tensor([float(len(c)) for c in clients])
    weight = recipe.weights(examples)
    share = (weight.double() / weight.sum()).tolist()
    loss, squares, used, moved = [], [], [], set[str]()
    with seeds.kept():
        for k, client in enumerate(clients):
            seed = visit_seed(client, task, recipe)
            seeds.set_global(seed)
            memory = client.memory or recipe.strategy.remember(start)
            memory = {g: expand(to(m, here.device)) for g, m in memory.items()}
            own = strategy_seeds([client], task, recipe)
            ctx = Context(anchor, extras, memory, steps[k : k + 1], task.lr, (seed,), own)
            noise = private and replace(private, streams=private.streams[k : k + 1])
            with blamed([client], task):
                loss.append(here.visit(client.data, plans[k], ctx, noise))
            squares.append(total.see(near(here.weights())))
            buffers = {} if recipe.privacy else expand(near(here.floats()))
            if buffers and not settled(buffers, task.state):
                squares[k] = math.nan
            part = 1.0
            if recipe.privacy:
                norm = total.bound(_float64(squares[k:])).sqrt()
                part = float(shrunk(recipe, norm, examples[k : k + 1], task))
            used.append(share[k] * part if math.isfinite(squares[k]) else 0.0)
            if used[k]:
                total.add(used[k])
                add_weighted(floats, buffers, _float64(used[k:]))
                moved |= moving(buffers, task.state).keys()
    here.put_back()
    floats = {k: v for k, v in floats.items() if k in moved}
    return Turns(torch.stack(loss), _float64(squares), _float64(used), total, floats)


def visit_seed(client: Client, task: Task, recipe: Recipe) -> int:
    """What seeds the global generators while a client trains, for dropout and the like.

    Masks belong to places in a batch: one example more moves those of the others and of later steps, which
    no clip bounds. So under sample-level privacy nobody else may know them, the server included.
    """
    if isinstance(recipe.privacy, SampleLevel):
        secret = recipe.privacy.stream("masks", task.round, client.id).uniform(1)
        return int(float(secret) * 2**53)
    return seeds.derive(task.seed, "visit", task.round, client.id)


def strategy_seeds(clients: Sequence[Client], task: Task, recipe: Recipe) -> tuple[int, ...] | None:
    """What strategies draw from where ``visit_seed`` is a secret: whatever they send could show it."""
    if not isinstance(recipe.privacy, SampleLevel):
        return None
    return tuple(seeds.derive(task.seed, "strategy", task.round, c.id) for c in clients)


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@contextmanager
def blamed(clients: Sequence[Client], task: Task) -> Iterator[None]:
    """An error of the clients' own code names them."""
    try:
        yield
    except Exception as e:
        who = f"client {clients[0].id}" if len(clients) == 1 else f"{len(clients)} clients"
        raise ClientError(f"{who}, round {task.round}: {type(e).__name__}: {e}") from e
