"""What clients remember of a visit: what the strategy keeps, after what was really sent."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.strategies.base import Strategy, with_groups
from fedtorch.training.personal import GROUP
from fedtorch.training.results import Results
from fedtorch.tree import near, row, tmap
from fedtorch.types import Context, Stack


def confirmed(
    recipe: Recipe,
    ids: Sequence[str],
    sending: Sequence[str],
    sent: dict[str, Stack],
    memory: dict[str, Stack],
    ctx: Context,
) -> dict[str, Stack]:
    """The memory of those that send something, after what they really send; of others as it was."""
    places = [ids.index(i) for i in sending]
    chosen = {g: {n: v[places] for n, v in m.items()} for g, m in memory.items() if g != GROUP}
    with torch.no_grad():
        found = recipe.strategy.confirm(sent, chosen, ctx.among(places))
    known = ctx.memory | memory
    whole = {g: {n: v.clone() for n, v in known[g].items()} for g in found}
    for group, kept in found.items():
        for name, v in kept.items():
            whole[group][name][places] = v
    return memory | whole


def unchanged(kept: dict[str, Stack], ctx: Context) -> set[str]:
    """Groups that are what the visit began with, and have not been written to since."""
    same = {g for g, s in kept.items() if s is ctx.memory.get(g)}
    return {g for g in same if not any(v._version for v in kept[g].values())}


def remember(
    clients: Sequence[Client],
    memory: dict[str, Stack] | None,
    ctx: Context,
    good: Tensor,
    still: Collection[str] = (),
) -> None:
    """Clients whose update was finite keep their new memory, in the weights' own types.

    Copies: a row of a stack would keep that of all clients that it trained beside. ``still``: groups of
    ``ctx.memory`` that no visit has changed, of which clients keep what they have.
    """
    if memory is None and not still:
        return
    new, like = memory or {}, ctx.anchor | ctx.own
    for k in [k for k, fine in enumerate(good.tolist()) if fine]:
        had = {g: m for g, m in clients[k].memory.items() if g in still and g not in new}
        others = {
            g: m for g, m in ({g: ctx.memory[g] for g in still} | new).items() if g not in had
        }
        clients[k].memory = had | {
            g: {
                n: v.to(like[n].dtype if n in like else v.dtype, copy=True)
                for n, v in row(m, k).items()
            }
            for g, m in others.items()
        }


def alone(
    clients: Sequence[Client], trained: Results, strategy: Strategy, ctx: Context, good: Tensor
) -> None:
    """The new memory of clients whose changes were sent as they are, and as a sum: one after another.

    What a client keeps holds nobody else's in memory.
    """
    changes = trained.changes()
    ctx = replace(
        ctx,
        extras={g: near(e) for g, e in ctx.extras.items()},
        memory={g: near(m) for g, m in ctx.memory.items()},
    )
    groups = strategy.following(ctx)
    with torch.no_grad():
        for k, client in enumerate(clients):
            if good[k]:
                change = {n: changes[n][k : k + 1] for n in ctx.anchor}
                mine = {g: (times[k : k + 1], alike) for g, (times, alike) in groups.items()}
                found = strategy.confirm(with_groups(change, mine), {}, ctx.of(k))
                client.memory = {g: tmap(_alone, row(m, 0)) for g, m in found.items()}


def _alone(v: Tensor) -> Tensor:
    """The same, and a copy where it is a row of others' stack."""
    return v if v.untyped_storage().nbytes() == v.nbytes else v.clone()
