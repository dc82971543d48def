"""The weighted mean of clients of whom nobody needs to see each alone; what clients tell of a visit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtorch.client import Client, Recipe
from fedtorch.strategies import Strategy
from fedtorch.training.stacked import Implicit
from fedtorch.tree import expand
from fedtorch.types import Failure, Task, Update

LARGEST_LOSS = 1e6
"""Under a privacy plan losses beyond it, or that are no numbers, are told as this."""


def averages(recipe: Recipe) -> bool:
    """Whether strategy and privacy only average deltas, each scaled by a number of its own at most."""
    if type(recipe.strategy).upload is not Strategy.upload:
        return False
    one, task = torch.ones(1, dtype=torch.float64), Task({}, {}, 0, 0, 1.0, {"clip": 1.0})
    return recipe.privacy is None or recipe.privacy.shrink(one, one, task) is not None


def shrunk(recipe: Recipe, norms: Tensor, examples: Tensor, task: Task) -> Tensor:
    """What each client's change is multiplied by for privacy, [K]; 0 where it is not finite."""
    part = recipe.privacy.shrink(norms, examples, task) if recipe.privacy else None
    return torch.where(norms.isfinite(), 1.0 if part is None else part, 0.0)


def summed(
    clients: Sequence[Client],
    plans: Sequence[Tensor],
    task: Task,
    recipe: Recipe,
    trained: Implicit,
) -> tuple[Update, list[Failure]]:
    """One row: the weighted mean of the clients whose change is finite."""
    privacy = recipe.privacy
    clipped = privacy is not None and privacy.unit == "client"  # otherwise a norm is only a figure
    norms = trained.sq_norms(upper=clipped).cpu().sqrt()
    examples = torch.tensor([float(len(c)) for c in clients])
    part, finite = shrunk(recipe, norms, examples, task), norms.isfinite()
    norms = norms if bool(finite.all()) else torch.where(finite, norms, 0)
    figures = told(recipe, examples, plans, trained.loss, norms * part)
    # by client-level privacy made zero by the plan, and counted: who reports must not depend on data
    keep = [True] * len(clients) if clipped else finite.tolist()
    lost = [c for c, kept in zip(clients, keep, strict=True) if not kept]
    kept: slice | Tensor = torch.tensor(keep) if lost else slice(None)
    weight = recipe.weights(examples)[kept]
    share = torch.zeros_like(norms)
    share[kept] = weight.double() / weight.sum()
    some = len(lost) < len(clients)
    delta = trained.weighted_sum(share * part) if some else {}
    update = Update(
        ids=tuple(c.id for c, k in zip(clients, keep, strict=True) if k),
        sent={"delta": expand(delta)},
        # statistics of the data are never noised
        buffers=trained.buffers if some and not privacy else {},
        weight=weight,
        metrics={name: v[kept] for name, v in figures.items()},
        summed=True,
    )
    return update, failures(lost)


def told(
    recipe: Recipe, examples: Tensor, plans: Sequence[Tensor], loss: Tensor, norms: Tensor
) -> dict[str, Tensor]:
    """Those of the clients' figures that they may tell, each [K]."""
    privacy = recipe.privacy
    if privacy and privacy.strict and privacy.per_client:
        # nobody else is trusted: what is not noised does not leave
        return {"update_norm": norms}
    if privacy:
        # a server takes a figure that is not finite for a broken message: one row would leave a client out
        loss = loss.nan_to_num(LARGEST_LOSS).clamp(-LARGEST_LOSS, LARGEST_LOSS)
    return {
        "train_loss": loss,
        "examples": examples,
        "visited": visited(plans),
        "steps": torch.tensor([float(len(p)) for p in plans], dtype=torch.float64),
        "update_norm": norms,
    }


def visited(plans: Sequence[Tensor]) -> Tensor:
    """Examples each client takes, every pass counted, [K]."""
    if all(p.shape == plans[0].shape for p in plans):  # one call for all of them
        return (torch.stack(list(plans)) >= 0).sum((1, 2)).float()
    return torch.tensor([float((p >= 0).sum()) for p in plans])


def failures(lost: Sequence[Client]) -> list[Failure]:
    """A failure for each client that is not kept."""
    return [Failure(c.id, "nonfinite", "its update is not finite") for c in lost]
