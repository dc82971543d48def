"""What clients do in a round: ``local_update`` trains some of them and returns what they send.

Behind it stand solvers with one meaning: ``general`` (one client after another, any module), ``stacked``
(K clients at once through torch.func) and the fast path. Strategies never know which one ran.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.channel.base import Turn, decode, encode, without_unsent
from fedtorch.client import Client
from fedtorch.privacy import canaries
from fedtorch.recipe import Recipe
from fedtorch.strategies.base import Strategy
from fedtorch.training import stacked
from fedtorch.training.asked import ClientsData
from fedtorch.training.batches import sampled_order
from fedtorch.training.local_steps import rates, reach
from fedtorch.training.memory import alone, confirmed, remember, unchanged
from fedtorch.training.module import buffers, resting, to, to_device
from fedtorch.training.passes import Passes
from fedtorch.training.personal import GROUP, personal, shared
from fedtorch.training.reserve import Reserve
from fedtorch.training.results import Results, exact_weights
from fedtorch.training.sequential import naming_client, train_sequentially
from fedtorch.tree import (
    expand,
    finite_per_client,
    near,
    row,
    settled,
    stack,
    tmap,
    to_float64,
    vector,
)
from fedtorch.types import AUDIT, Context, Failure, Raw, Released, Stack, Task, altered


def local_update(
    clients: Sequence[Client],
    task: Task,
    recipe: Recipe,
    model: nn.Module,
    solve: stacked.Solver | None = None,
    reserve: Reserve | None = None,
) -> tuple[Released, list[Failure]]:
    """Train ``clients`` from the global model and return what they send.

    ``model`` is a working copy that is overwritten. Without ``solve`` several clients run side by side
    (stacked) and one alone through the module itself. A client whose result is not finite is a
    Failure, keeps its memory as it was, and is left out of what is sent, which may then be empty.
    ``reserve``: of whoever calls this again and again.
    """
    recipe.privacy.check_numbers(task.privacy)
    trained = (k for k, p in model.named_parameters() if p.requires_grad)
    still = recipe.strategy.rests(trained, task.extras)
    with resting(model, still) if still else nullcontext():
        return _visits(clients, to_device(task, model), recipe, model, solve, reserve or Reserve())


def _visits(
    clients: Sequence[Client],
    task: Task,
    recipe: Recipe,
    model: nn.Module,
    solve: stacked.Solver | None,
    reserve: Reserve,
) -> tuple[Released, list[Failure]]:
    privacy, ids = recipe.privacy, [c.id for c in clients]
    # which examples each client sees in which step, and what it starts from
    order = orders(clients, recipe, task)
    ctx = context(clients, order, task, recipe, model)
    watches = _watches([c for c in clients if AUDIT in c.memory], task, recipe)
    data = ClientsData(
        clients, order, task, recipe, model, ctx.own, watches=watches, reserve=reserve
    )
    if not privacy.per_example:
        ctx = altered(ctx, data=data)
    told = _told(clients, task, recipe, model)
    # local steps, clipped and noised where the plan says so
    trained, kept = _trained(data, ctx, solve)
    # what it hands back as it was is neither looked at nor written again
    still = unchanged(kept, ctx)
    kept = {g: s for g, s in kept.items() if g not in still}
    # what the strategy makes of them, and what of that may leave the clients
    ctx = altered(ctx, memory={**ctx.memory, **kept})
    precise = exact(task, ctx) if recipe.needs_rows else ctx
    raw, memory = raw_of(data, precise, trained, kept)
    raw = replace(raw, told=told) if told else raw
    released, good = privacy.release(raw, task)
    # made smaller where the recipe has a channel
    members = [c for c in clients if c.id in released.ids]
    groups = [*(raw.groups or ["delta"])] if members else []
    turn = Turn.of(task, released.ids) if recipe.channel else Turn()
    released, unsent = encode(recipe.channel, released, groups, [c.memory for c in members], turn)
    # what each client keeps: by the strategy, after what was really sent, for an audit and the channel
    again = privacy.claims or recipe.channel or recipe.strategy.only_delta
    if recipe.strategy.confirms and memory is not None and members and again:
        like = {g: row(s, 0) for g, s in (raw.groups or {}).items()} if recipe.channel else {}
        sent = decode(recipe.channel, released, like, turn).sent
        memory = confirmed(recipe, ids, released.ids, sent, memory, precise)
    remember(clients, memory, ctx, good, still)
    if memory is None and recipe.strategy.confirms:
        alone(clients, trained, recipe.strategy, ctx, good)
    dtype = next(iter(ctx.anchor.values())).dtype
    for client in members:
        if watch := data.watches.get(client.id):
            client.memory = client.memory | {AUDIT: watch.after()}
    for client, left in zip(members, unsent, strict=True):
        client.memory = client.memory | {g: tmap(lambda v: v.to(dtype), m) for g, m in left.items()}
    lost = [i for i in ids if i not in released.ids]
    return released, [Failure(i, "nonfinite", "its update is not finite") for i in lost]


def _told(
    clients: Sequence[Client], task: Task, recipe: Recipe, model: nn.Module
) -> tuple[Tensor, ...]:
    """What the plan's own figures are made of, in rounds that tell them."""
    if "figures" not in task.privacy:
        return ()
    from fedtorch.training.told import examples  # few rounds do

    return examples(clients, task, recipe, model)


def _watches(clients: Sequence[Client], task: Task, recipe: Recipe) -> dict[str, canaries.Watch]:
    """Of the clients that have canaries of an audit among their examples."""
    if not clients:
        return {}
    ids, kept = [c.id for c in clients], [c.memory[AUDIT] for c in clients]
    found = canaries.of(recipe.privacy, kept, ids, recipe, task)
    return dict(zip(ids, found, strict=True))


def orders(clients: Sequence[Client], recipe: Recipe, task: Task) -> list[Tensor]:
    """Which examples each client takes in which step, [steps, batch]; a sampler of its own says."""
    order = recipe.privacy.batches([len(c) for c in clients], recipe, task, [c.id for c in clients])
    for k, client in enumerate(clients):
        if client.sampler is not None:
            seed = seeds.derive(task.seed, "sampler", *task.draw, client.id)
            with naming_client([client.id], task):
                order[k] = sampled_order(len(client), recipe, client.sampler, seed, task.round)
    return order


def _trained(
    data: ClientsData, ctx: Context, solve: stacked.Solver | None
) -> tuple[Results, dict[str, Stack]]:
    """What local steps leave, and what a strategy of several passes remembers of them."""
    task, recipe = data.task, data.recipe
    if not recipe.strategy.trains:
        return _solved(data, ctx, solve), {}

    def run(
        order: Sequence[Tensor], asked: Recipe, ctx: Context, plain: bool, whole: bool
    ) -> Results:
        takes = getattr(solve, "takes", None)
        suits = plain or takes is None or (whole and takes(asked))
        return _solved(replace(data, order=order, recipe=asked), ctx, solve if suits else None)

    again = partial(orders, data.clients, task=task)
    passes = Passes(task, recipe, data.model, ctx, data.order, again, run)
    # what stays with the client may look at its data
    found, kept = recipe.strategy.train(passes, replace(ctx, data=data))
    passes.check(found)
    return found, kept


def _solved(data: ClientsData, ctx: Context, solve: stacked.Solver | None) -> Results:
    clients, task, recipe = data.clients, data.task, data.recipe
    ids = [c.id for c in clients]
    private = recipe.privacy.steps_of(task, ids)
    if private and data.watches:
        private = canaries.watched(private, [data.watches.get(i) for i in ids])
    if solve is None:
        alone = len(clients) == 1 and not (private and private.mode == "stacked")
        solve = stacked.general if alone else stacked.stacked
    if recipe.strategy.contrasts and len(clients) > 1 and solve is not stacked.general:
        raise ValueError("an objective of the strategy's own is one client's: train one at a time")
    if solve is stacked.general and len(clients) > 1:
        return train_sequentially(
            clients, data.order, ctx, task, recipe, data.model, private, data.reserve
        )
    draws = stacked.draws(solve, recipe)
    secret = tuple(recipe.privacy.draw_seed(task, i) for i in ids) if draws else ()
    # putting generators back takes a tenth of a millisecond
    with seeds.seeded(secret[0]) if draws else nullcontext(), naming_client(ids, task):
        chunk = stacked.Chunk([c.data for c in clients], data.order, ctx, private, secret)
        return solve(data.model, chunk, task, recipe)


def context(
    clients: Sequence[Client], order: Sequence[Tensor], task: Task, recipe: Recipe, model: nn.Module
) -> Context:
    """What strategies see of these clients' visits."""
    patterns, strategy_seed = recipe.strategy.personal, recipe.privacy.strategy_seed
    ids = [c.id for c in clients]
    anchor = {k: task.state[k] for k in shared(model, patterns)}
    device = next(iter(anchor.values())).device
    known = (without_unsent(c.memory) if c.memory else {} for c in clients)
    kept = [{g: m for g, m in memory.items() if g != GROUP} for memory in known]
    floats = {k: task.state[k] for k in buffers(model)} if recipe.strategy.floats else {}
    floats = {k: v for k, v in floats.items() if v.is_floating_point()}
    seen = anchor | floats
    memory = [m or recipe.strategy.remember(seen) for m in kept]
    # who is here for the first time starts from the model's
    kept_names = personal(model, patterns)
    start = {k: v for k, v in task.state.items() if k in kept_names}
    own = [start | to(c.memory[GROUP], device) if GROUP in c.memory else start for c in clients]
    steps = vector([len(p) for p in order], np.int64)
    return Context(
        anchor=expand(anchor),
        extras={g: expand(e) for g, e in task.extras.items()},
        memory={g: to(stack([m[g] for m in memory]), device) for g in memory[0]},
        steps=steps,
        lr=task.lr,
        seeds=seeds.Later(lambda: tuple(strategy_seed(task, i) for i in ids), len(ids)),
        own=stack(own),
        lr_sum=rates(recipe, task.lr, steps),
        reach=partial(reach, recipe, task.lr, steps),
    )


def raw_of(
    data: ClientsData, ctx: Context, trained: Results, kept: Mapping[str, Stack] = {}
) -> tuple[Raw, dict[str, Stack] | None]:
    """What visits left, with each client's own upload where that is needed, and the new memory."""
    clients, recipe = data.clients, data.recipe
    examples, figures = figures_of(clients, data.order, trained)
    if recipe.local is not None and bool(trained.loss.isnan().any()):
        del figures["train_loss"]  # a local update of one's own tells it or not
    groups: dict[str, Stack] | None = None
    memory: dict[str, Stack] | None = None
    fine = trained.settled() if recipe.privacy.statistics else None
    if recipe.needs_rows:
        with torch.no_grad():
            rows, floats = trained.rows()
            params = {k: rows[k].to(torch.float64, copy=True) for k in ctx.anchor}
            with seeds.seeded(seeds.derive(0, "upload", *ctx.seeds)):
                groups, memory = recipe.strategy.upload(params, ctx)
        if ctx.own:
            now = rows | floats
            memory = memory | {GROUP: {k: now[k].detach().cpu().clone() for k in ctx.own}}
            good = settled(memory[GROUP], data.task.state)
            fine = good if fine is None else fine & good
    if kept:
        memory = {**(memory or {}), **{g: near(m) for g, m in kept.items()}}
    for group in kept.values():
        good = finite_per_client(group).cpu()
        fine = good if fine is None else fine & good
    ids, weight, own = tuple(c.id for c in clients), recipe.weights(examples), frozenset(ctx.own)
    beside = partial(measured, recipe.strategy, ctx) if recipe.strategy.measures else None
    following = {} if recipe.needs_rows else recipe.strategy.following(ctx)
    return Raw(
        ids, examples, weight, figures, trained, groups, fine, own, beside, following
    ), memory


def figures_of(
    clients: Sequence[Client], order: Sequence[Tensor], trained: Results
) -> tuple[Tensor, dict[str, Tensor]]:
    """Examples of each client, [K], and figures about the visits, [K] each."""
    examples = vector([len(c) for c in clients], np.float32)
    return examples, {
        "train_loss": trained.loss,
        "examples": examples,
        "visited": visited(order),
        "steps": vector([len(p) for p in order]),
    }


def measured(strategy: Strategy, ctx: Context, norms: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """By the lengths of changes: what each is multiplied by, and the strategy's numbers, [K] each."""
    scale = strategy.scale(ctx, norms)
    numbers = {n: v.double() for n, v in strategy.numbers(ctx, norms).items()}
    return torch.ones_like(norms) if scale is None else scale.to(norms), numbers


def exact(task: Task, ctx: Context) -> Context:
    """In float64 a delta is exact, so that anchor + delta gives back the very weights of the client."""
    return replace(
        ctx,
        anchor=expand(exact_weights(task, [*ctx.anchor])),
        extras={g: to_float64(near(e)) for g, e in ctx.extras.items()},
        memory={g: to_float64(near(m)) for g, m in ctx.memory.items()},
    )


def visited(order: Sequence[Tensor]) -> Tensor:
    """Examples each client takes, every pass counted, [K]."""
    if all(p.shape == order[0].shape for p in order):  # one call for all of them
        found = torch.stack(list(order))
        if int(found.min()) >= 0:
            return vector([p.numel() for p in order], np.float32)
        return (found >= 0).sum((1, 2)).float()
    return vector([float((p >= 0).sum()) for p in order], np.float32)
