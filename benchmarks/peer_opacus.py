"""Opacus in the bare loop: DP-SGD by hooks or by ghost clipping, as its users write it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from benchmarks.bare import Bare, Visit
from benchmarks.workloads import Problem, Workload


def hooks(problem: Problem) -> Bare:
    """Per-example gradients, written out and clipped."""
    return private(problem, GradSampleModule, DPOptimizer, lambda module, optimizer: None)


def ghost(problem: Problem) -> Bare:
    """Per-example norms alone, then a second backward pass with weights."""

    def loss(module: nn.Module, optimizer: object) -> object:
        criterion = nn.CrossEntropyLoss()
        return DPLossFastGradientClipping(module, optimizer, criterion, "mean")

    wrap = lambda m: GradSampleModuleFastGradientClipping(m, max_grad_norm=1.0)  # noqa: E731
    return private(problem, wrap, DPOptimizerFastGradientClipping, loss)


def private(problem: Problem, wrap: Callable, optimizer: type, criterion: Callable) -> Bare:
    """The bare loop whose visits step privately: clip 1, the workload's noise, batches of ten."""
    bare = Bare(problem)
    bare.visit = steps(problem.work, problem.noise, wrap(bare.local), optimizer, criterion)
    return bare


def steps(
    work: Workload, noise: float, module: nn.Module, optimizer: type, criterion: Callable
) -> Visit:
    """A pass of DP-SGD over the model that ``module`` wraps."""

    def visit(model: nn.Module, x: Tensor, y: Tensor) -> None:
        own = optimizer(
            torch.optim.SGD(module.parameters(), lr=work.lr),
            noise_multiplier=noise,
            max_grad_norm=1.0,
            expected_batch_size=work.batch_size,
        )
        loss = criterion(module, own) or F.cross_entropy
        for xb, yb in zip(x.split(work.batch_size), y.split(work.batch_size), strict=True):
            own.zero_grad()
            loss(module(xb), yb).backward()
            own.step()

    return visit
