"""Whether the fast path can train these clients with this recipe, and the trial that it does."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedtorch import seeds
from fedtorch.checks.trial import FEW, TOLERANCE, difference, fills_up, pooled, some
from fedtorch.fast.example_gradients import unknown
from fedtorch.fast.linear import optimizer, plain, strategy
from fedtorch.fast.reader import Chain, read
from fedtorch.fast.solver import Fast
from fedtorch.privacy.base import PerExample, Privacy
from fedtorch.privacy.clipping import rounds_short
from fedtorch.recipe import Recipe
from fedtorch.training.batches import len_of
from fedtorch.training.losses import LOSSES, reduce


def offer(
    model: nn.Module,
    datasets: Sequence[Dataset],
    recipe: Recipe,
    privacy: Privacy | None = None,
    half: bool = False,
) -> Fast | str:
    """A solver for this model (``half``: in bfloat16), or one clause that says why there is none."""
    why = "the recipe has a step of its own" if recipe.step is not None else None
    why = why or optimizer(recipe) or strategy(recipe) or tables(model, datasets)
    plan = privacy.per_example if privacy else None
    if privacy and privacy.claims and rounds_short():
        why = (
            why
            or "torch.set_float32_matmul_precision lets products round beyond what clipping bounds"
        )
    if plan and plan.mode != "auto":
        why = why or f"privacy.mode {plan.mode} was asked for"
    if why:
        return why
    x, y = datasets[0].tensors  # type: ignore[attr-defined]
    # copies: a model may write on what it is given
    x, y = (t[:2].clone().to(next(model.parameters()).device) for t in (x, y))
    with seeds.kept():  # reading and trying a model may draw
        chain = read(model, x)
    if isinstance(chain, str):
        return chain
    if plan:
        why = noise(chain, model, datasets, recipe, plan)
    if why := why or draws(chain, model, datasets, recipe.accumulate):
        return why
    return tried(Fast(chain), (x, y), model, datasets, recipe, plan is not None) or Fast(
        chain, half
    )


def tried(
    solver: Fast,
    batch: tuple[Tensor, Tensor],
    model: nn.Module,
    datasets: Sequence[Dataset],
    recipe: Recipe,
    private: bool,
) -> str | None:
    """What a trial speaks against the solver, if anything."""
    x, y = batch
    try:
        with torch.no_grad(), seeds.kept():
            if reduce(recipe.loss(model(x), y)).dim() == 0:
                return "the loss gives one number for the whole batch, not one for each example"
        error = nearest(solver, model, datasets, recipe, private)
    except Exception as e:  # a label without an output, say: training will name it better
        return f"a trial failed ({type(e).__name__})"
    own = not private and recipe.loss not in LOSSES.values()
    if own and fills_up(solver, model, pooled(datasets), recipe):
        return "the loss looks at the whole batch, not at each example alone"
    if not error < TOLERANCE:
        return f"a trial of two steps differs from the general path by {error:.1e}"
    return None


def noise(
    chain: Chain,
    model: nn.Module,
    datasets: Sequence[Dataset],
    recipe: Recipe,
    privacy: PerExample,
) -> str | None:
    """Why private steps have no fast form; None where they have."""
    if privacy.projected and not plain(recipe):
        return "projected noise needs plain SGD and no correction of gradients"
    if privacy.projected and chain.drops_inputs:
        return "projected noise needs examples as they are, and the model drops some of each"
    if chain.front is None:
        return None
    if privacy.projected:
        return "projected noise needs a linear layer that takes the examples themselves"
    return unknown(model, chain.front, math.ceil(privacy.batch_size))


def draws(
    chain: Chain, model: nn.Module, datasets: Sequence[Dataset], accumulate: int
) -> str | None:
    """Why dropout would draw other numbers than on the general path; None where it draws the same."""
    if not chain.drops:
        return None
    if accumulate > 1:
        return "dropout draws for each of the batches that make a step (accumulate)"
    if next(model.parameters()).device.type != "cpu":
        return "dropout draws the masks of the general path on a CPU alone"
    apart = [d for d in datasets if not d.tensors[0].is_contiguous()]  # type: ignore[attr-defined]
    if apart and (chain.drops_inputs or (chain.front and chain.front.drops)):
        return "dropout among its first layers needs examples that are contiguous in memory"
    return None


def tables(model: nn.Module, datasets: Sequence[Dataset]) -> str | None:
    """Plain tensors (x, y), all alike, in the type of the weights."""
    dtype = next(model.parameters()).dtype
    kinds = set()
    for data in datasets:
        if type(data) is not TensorDataset or len(data.tensors) != 2:
            return "the data is not a pair of tensors (x, y)"
        x, y = data.tensors
        if (x.dtype != dtype and x.is_floating_point()) or x.dim() < 2:
            return f"examples are {x.dtype} of {x.dim()} axes, the weights {dtype}"
        kinds.add((x.shape[1:], y.shape[1:], y.dtype))
    return None if len(kinds) == 1 else "examples of clients differ in shape"


def nearest(
    solver: Fast, model: nn.Module, datasets: Sequence[Dataset], recipe: Recipe, private: bool
) -> float:
    """The least difference of a trial on one client's data or, while they differ, two others'.

    Where rounding decides a tie (ReLU at zero, equal pixels in a pool) two right ways part; a mistake
    shows on everybody's data.
    """
    error = math.inf
    for data in (datasets[0], datasets[len(datasets) // 2], datasets[-1]):
        if not error < TOLERANCE:
            few = some(data, torch.arange(min(len_of(data), FEW)))
            error = min(error, difference(solver, model, [few], recipe, private))
    return error
