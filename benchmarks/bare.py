"""The baseline: federated averaging as one would write it by hand in PyTorch, without any framework.

Kept as fast as plain PyTorch goes: one working model, one gather a visit, the sum built in place.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import Problem, Workload

Visit = Callable[[nn.Module, Tensor, Tensor], None]
"""What a client does: (working model, its examples in the order of the batches)."""


class Bare:
    """One global model, one working copy, a loop over clients and batches."""

    def __init__(self, problem: Problem, visit: Visit | None = None) -> None:
        self.problem = problem
        self.model, self.local = problem.model(), problem.model()
        self.visit = visit or sgd(problem.work)
        self.noise = problem.noise if problem.work.privacy == "client" else None
        self.orders = problem.orders()

    def round(self) -> None:
        """Train every client from the global weights and take the mean."""
        state = self.model.state_dict()
        total = {k: torch.zeros_like(v) for k, v in state.items()}
        orders = self.orders.pop(0)
        for (x, y), order in zip(self.problem.shards, orders, strict=True):
            self.local.load_state_dict(state)
            self.visit(self.local, x[order], y[order])
            local = self.local.state_dict()
            if self.noise is not None:
                local = clipped(local, state)
            for k, v in local.items():
                total[k].add_(v)
        K = len(orders)
        if self.noise is not None:
            std = self.noise
            total = {k: state[k] + (v + std * torch.randn_like(v)) / K for k, v in total.items()}
        else:
            total = {k: v.div_(K) for k, v in total.items()}
        self.model.load_state_dict(total)

    def evaluate(self) -> tuple[float, float]:
        """Accuracy and loss on the test set."""
        return evaluate(self.model, self.problem.test)


def sgd(work: Workload) -> Visit:
    """One pass of plain SGD."""

    def visit(model: nn.Module, x: Tensor, y: Tensor) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=work.lr)
        for xb, yb in zip(x.split(work.batch_size), y.split(work.batch_size), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(xb), yb).backward()
            optimizer.step()

    return visit


def clipped(local: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The client's update, scaled to an L2 norm of at most 1."""
    delta = {k: v - state[k] for k, v in local.items()}
    norm = torch.stack([d.norm() for d in delta.values()]).norm()
    scale = (1 / norm).clamp(max=1)
    return {k: d.mul_(scale) for k, d in delta.items()}


@torch.no_grad()
def evaluate(model: nn.Module, test: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Accuracy and mean loss, 500 examples at a time."""
    right = loss = 0.0
    for x, y in zip(test[0].split(500), test[1].split(500), strict=True):
        output = model(x)
        right += float((output.argmax(1) == y).sum())
        loss += float(F.cross_entropy(output, y, reduction="sum"))
    return right / len(test[1]), loss / len(test[1])
