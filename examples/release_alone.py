"""The release alone: 30 sites train in plain PyTorch, and each keeps its own promise.

Nothing of this loop is fedtorch's: it stands for the framework that you have. What a site adds is a budget
in its own folder, and one line before its update leaves. Thirty sites, as nobody is trusted: each adds
noise for itself alone, and the mean of n updates keeps one n-th of its variance.
"""

import tempfile
from pathlib import Path

import torch

from fedtorch.privacy import Budget, LocalDP

torch.manual_seed(0)
truth = torch.tensor([1.0, -2.0, 0.5])
tables = [torch.randn(100, 3) for _ in range(30)]
sites = [(x, (x @ truth + 0.1 * torch.randn(100) > 0).float()) for x in tables]

plan = LocalDP(epsilon=8.0, delta=1e-5, clip=1.0, rounds=4)
with tempfile.TemporaryDirectory() as disks:
    budgets = [Budget(Path(disks) / f"site{i}", plan, site=f"site{i}") for i in range(len(sites))]
    weights = torch.zeros(3)
    for round in range(4):
        updates = []
        for (x, y), budget in zip(sites, budgets, strict=True):
            mine = weights.clone().requires_grad_()
            step = torch.optim.SGD([mine], lr=2.0)
            for _ in range(5):
                step.zero_grad()
                torch.nn.functional.binary_cross_entropy_with_logits(x @ mine, y).backward()
                step.step()
            update = {"weights": mine.detach() - weights}
            updates.append(budget.release(update, round)["weights"])  # the line
        weights = weights + torch.stack(updates).mean(0)
        right = sum(((x @ weights > 0) == (y > 0)).float().mean() for x, y in sites) / len(sites)
        print(f"round {round}: accuracy {right:.3f}, epsilon {budgets[0].spent:.3f}")
