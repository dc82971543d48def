"""What clients do in a round: ``local_update`` trains some of them and returns what they send.

Behind it stand solvers with one meaning: ``general`` (one client after another, any module), ``stacked``
(K clients at once through torch.func) and the fast path. Strategies never know which one ran.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.client import Client, Recipe
from fedtorch.fast import Fast
from fedtorch.privacy import SampleLevel
from fedtorch.privacy.base import check_clip
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.strategies import Strategy
from fedtorch.training import stacked
from fedtorch.training.batches import plan
from fedtorch.training.module import to, to_device
from fedtorch.training.reduced import averages, failures, summed, told
from fedtorch.training.sequential import blamed, in_turn, strategy_seeds, visit_seed
from fedtorch.tree import double, expand, has_float64, moving, near, row, settled, sq_norms, stack
from fedtorch.types import Context, Failure, Params, Task, Update


def local_update(
    clients: Sequence[Client],
    task: Task,
    recipe: Recipe,
    model: nn.Module,
    solve: stacked.Solver | None = None,
) -> tuple[Update, list[Failure]]:
    """Train ``clients`` from the global model and return what they send.

    ``model`` is a working copy that is overwritten. Without ``solve`` several clients run side by side
    (stacked) and one alone through the module itself. A client whose result is not finite is a
    Failure, keeps its memory as it was, and is left out of the Update, which may then be empty.
    """
    if recipe.privacy:
        check_clip("a task's clip", task.privacy["clip"])
    task = to_device(task, model)
    plans, private = _steps(clients, task, recipe)
    if solve is stacked.general and len(clients) > 1:
        turns = in_turn(clients, plans, task, recipe, model, private)
        return summed(clients, plans, task, recipe, turns)
    if solve is None:
        alone = len(clients) == 1 and not (private and private.mode == "stacked")
        solve = stacked.general if alone else stacked.stacked
    draws = not isinstance(solve, Fast) or solve.draws(recipe)
    # an upload of one's own may draw as well
    seeded = draws or type(recipe.strategy).upload is not Strategy.upload
    ctx = _context(clients, plans, task, recipe, model, seeded)
    # putting generators back takes a tenth of a millisecond
    with seeds.seeded(ctx.seeds[0]) if draws else nullcontext(), blamed(clients, task):
        trained = solve(model, [c.data for c in clients], plans, task, recipe, ctx, private)
    if isinstance(trained, stacked.Implicit) and averages(recipe):
        return summed(clients, plans, task, recipe, trained)
    return _apart(clients, plans, task, recipe, ctx, trained)


def _steps(
    clients: Sequence[Client], task: Task, recipe: Recipe
) -> tuple[list[Tensor], PrivateSteps | None]:
    """Which examples each client sees in which step, and what makes the steps private, if anything."""
    privacy = recipe.privacy
    if not isinstance(privacy, SampleLevel):
        order = [seeds.derive(task.seed, "order", task.round, c.id) for c in clients]
        return [plan(len(c), recipe, s) for c, s in zip(clients, order, strict=True)], None
    batches, noise = (
        [privacy.stream(purpose, task.round, c.id) for c in clients]
        for purpose in ("batches", "noise")
    )
    plans = [privacy.batches(len(c), s) for c, s in zip(clients, batches, strict=True)]
    return plans, PrivateSteps(
        task.privacy["clip"],
        task.privacy["noise"],
        privacy.batch_size,
        noise,
        "stacked" if privacy.mode == "auto" else privacy.mode,
        privacy.max_batch,
    )


def _context(
    clients: Sequence[Client],
    plans: Sequence[Tensor],
    task: Task,
    recipe: Recipe,
    model: nn.Module,
    seeded: bool,
) -> Context:
    anchor = {k: task.state[k] for k, p in model.named_parameters() if p.requires_grad}
    memory = [c.memory or recipe.strategy.remember(anchor) for c in clients]
    device = next(iter(anchor.values())).device
    return Context(
        anchor=expand(anchor),
        extras={g: expand(e) for g, e in task.extras.items()},
        memory={g: to(stack([m[g] for m in memory]), device) for g in memory[0]},
        steps=torch.tensor([len(p) for p in plans]),
        lr=task.lr,
        seeds=tuple(visit_seed(c, task, recipe) for c in clients) if seeded else (),
        own=strategy_seeds(clients, task, recipe),
    )


def exact_weights(task: Task, names: Sequence[str]) -> Params:
    """The task's weights in float64, where that can be had."""
    if has_float64(task.state[names[0]].device):
        return {k: task.exact[k] for k in names}
    return double(near({k: task.state[k] for k in names}))


def _apart(
    clients: Sequence[Client],
    plans: Sequence[Tensor],
    task: Task,
    recipe: Recipe,
    ctx: Context,
    trained: Any,
) -> tuple[Update, list[Failure]]:
    """Every client's own upload, a row for each."""
    # in float64 the delta is exact, so anchor + delta gives back the very weights of the client
    exact = replace(
        ctx.shown(),
        anchor=expand(exact_weights(task, [*ctx.anchor])),
        extras={g: double(near(e)) for g, e in ctx.extras.items()},
        memory={g: double(near(m)) for g, m in ctx.memory.items()},
    )
    with torch.no_grad():
        params = {k: v.to(torch.float64, copy=True) for k, v in trained.params.items()}
        sent, remembered = recipe.strategy.upload(params, exact)
    buffers = {} if recipe.privacy else trained.buffers  # statistics of the data are never noised
    norms = {g: sq_norms(s) for g, s in sent.items()}
    good = [n.isfinite() for n in norms.values()]
    good += [settled(buffers, task.state)] if buffers else []
    keep = torch.stack(good).all(0).cpu()
    for k, client in enumerate(clients):
        if keep[k]:
            client.memory = {
                g: {n: v.to(ctx.anchor[n].dtype) for n, v in row(m, k).items()}
                for g, m in remembered.items()
            }
    examples = torch.tensor([float(len(c)) for c in clients])
    if recipe.privacy:
        sent = recipe.privacy.client(sent, examples, task, [c.id for c in clients])
        norms["delta"] = sq_norms(sent["delta"])
        if recipe.privacy.unit == "client":
            # made zero by the plan, and sent: who reports must not depend on anybody's data
            keep = torch.ones_like(keep)
    figures = told(recipe, examples, plans, trained.loss, norms["delta"].sqrt().cpu())
    kept = slice(None) if keep.all() else keep  # a slice is a view, a mask would copy everything
    update = Update(
        ids=tuple(c.id for k, c in enumerate(clients) if keep[k]),
        sent={g: {n: v[kept] for n, v in s.items()} for g, s in sent.items()},
        buffers=moving({n: v[kept] for n, v in buffers.items()}, task.state),
        weight=recipe.weights(examples)[kept],
        metrics={name: v[kept] for name, v in figures.items()},
    )
    return update, failures([c for c, k in zip(clients, keep.tolist(), strict=True) if not k])
