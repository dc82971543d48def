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
Twin = Callable[[nn.Module], nn.Module] | None


class Bare:
    """One global model, one working copy, a loop over clients and batches."""

    def __init__(self, problem: Problem, visit: Visit | None = None, twin: Twin = None) -> None:
        """``twin``: what to make of the model before."""
        self.problem = problem
        made = [problem.model() for _ in range(2)]
        self.model, self.local = map(twin, made) if twin else made
        self.visit = visit or sgd(problem.work)
        self.noise = problem.noise if problem.work.privacy == "client" else None
        self.orders = problem.orders()

    def round(self) -> None:
        """Train every client from the global weights and take the mean."""
        state = moved(self.model)
        total = {k: torch.zeros_like(v) for k, v in state.items()}
        orders = self.orders.pop(0)
        for (x, y), order in zip(self.problem.shards, orders, strict=True):
            self.local.load_state_dict(state, strict=False)
            self.visit(self.local, x[order], y[order])
            local = moved(self.local)
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
        self.model.load_state_dict(total, strict=False)

    def evaluate(self) -> tuple[float, float]:
        """Accuracy and loss on the test set."""
        return evaluate(self.model, self.problem.test)


def nudged(problem: Problem, share: float = 3e-7) -> Bare:
    """The loop from first weights that differ by a share as rounding does: how far that alone leads."""
    bare, draw = Bare(problem), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in bare.model.parameters():
            p.mul_(1 + share * torch.randn(p.shape, generator=draw))
    return bare


def moved(model: nn.Module) -> dict[str, Tensor]:
    """What a round changes: no frozen weights, and no counters."""
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    state = model.state_dict()
    return {k: v for k, v in state.items() if k not in frozen and v.is_floating_point()}


def loss(output: Tensor, y: Tensor) -> Tensor:
    """The mean; of text [B, C, T] classes last, which is the faster way."""
    if output.dim() > 2:
        output, y = output.transpose(1, 2).flatten(0, 1), y.flatten()
    return F.cross_entropy(output, y)


def sgd(work: Workload) -> Visit:
    """One pass of plain SGD."""

    def visit(model: nn.Module, x: Tensor, y: Tensor) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=work.lr)
        for xb, yb in zip(x.split(work.batch_size), y.split(work.batch_size), strict=True):
            optimizer.zero_grad()
            loss(model(xb), yb).backward()
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
    model.eval()
    right = total = 0.0
    for x, y in zip(test[0].split(500), test[1].split(500), strict=True):
        output = model(x)
        right += float((output.argmax(1) == y).sum())
        total += float(loss(output, y)) * y.numel()
    return right / test[1].numel(), total / test[1].numel()
