"""Opacus in the bare loop: DP-SGD by hooks or by ghost clipping, as its users write it."""

from collections.abc import Callable
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from benchmarks.bare import Bare, Visit, loss
from benchmarks.networks import for_opacus
from benchmarks.workloads import Problem, Workload

Loss = Callable[[Tensor, Tensor], Any]


def hooks(problem: Problem) -> Bare:
    """Per-example gradients, written out and clipped."""
    return private(problem, GradSampleModule, DPOptimizer, lambda module, optimizer: loss)


def ghost(problem: Problem) -> Bare:
    """Per-example norms alone, then a second backward pass with weights."""

    def of(module: nn.Module, optimizer: object) -> Loss:
        each = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss(), "mean")

        def criterion(output: Tensor, y: Tensor) -> Any:
            if output.dim() == 2:
                return each(output, y)
            flat = output.transpose(1, 2).flatten(0, 1)
            return each(flat, y.flatten(), shape=(*y.shape, output.shape[1]))

        return criterion

    wrap = lambda m: GradSampleModuleFastGradientClipping(m, max_grad_norm=1.0)  # noqa: E731
    return private(problem, wrap, DPOptimizerFastGradientClipping, of)


def private(problem: Problem, wrap: Callable, optimizer: type, criterion: Callable) -> Bare:
    """The bare loop whose visits step privately: clip 1, the workload's noise, fixed batches."""
    bare = Bare(problem, twin=for_opacus)
    bare.visit = steps(problem.work, problem.noise, wrap(bare.local), optimizer, criterion)
    return bare


def steps(
    work: Workload, noise: float, module: nn.Module, optimizer: type, criterion: Callable
) -> Visit:
    """A pass of DP-SGD over the model that ``module`` wraps."""

    def visit(model: nn.Module, x: Tensor, y: Tensor) -> None:
        own = optimizer(
            torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=work.lr),
            noise_multiplier=noise,
            max_grad_norm=1.0,
            expected_batch_size=work.batch_size,
        )
        of = criterion(module, own)
        for xb, yb in zip(x.split(work.batch_size), y.split(work.batch_size), strict=True):
            own.zero_grad()
            of(module(xb), yb).backward()
            own.step()

    return visit
