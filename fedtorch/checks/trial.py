"""Two steps on a few examples, trained in one way and in the plainest: what shows that a way is right."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fedtorch import seeds
from fedtorch.options import TrainingOptions
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.noise.streams import stream
from fedtorch.recipe import Recipe
from fedtorch.training.batches import batch_order, fetch, len_of
from fedtorch.training.module import load, snapshot, to, training
from fedtorch.training.stacked import Chunk, Solver, general, normalises
from fedtorch.tree import expand, near, parts, row, same, sq_norms, tmap
from fedtorch.types import Context, Params, Task

SEED = 0
"""Of the trial's masks."""

TOLERANCE = 1e-3
"""Two steps on a few examples differ by rounding, which is far less, or by a mistake, which is more."""

FEW = 9
"""Examples to try with: a batch of five, and a shorter one."""

LOOKED_AT = 36
"""Examples among which they are chosen."""

STEPS = TrainingOptions(steps=2, batch_size=5)
"""Two steps, of unequal size."""


def some(data: Dataset, index: Tensor) -> Dataset:
    """A few of the examples."""
    if isinstance(data, TensorDataset):
        return TensorDataset(*(t[index] for t in data.tensors))
    return Subset(data, index.tolist())


def pooled(datasets: Sequence[Dataset]) -> Dataset:
    """A few examples of several clients, of as many classes as are found: one client may have one alone.

    What a loss does with the others of a class is seen by that class alone.
    """
    who = torch.linspace(0, len(datasets) - 1, min(len(datasets), FEW)).long().tolist()
    each = -(-LOOKED_AT // len(who))
    parts = [some(d, evenly(len_of(d), each)) for d in (datasets[k] for k in who)]
    tables = [p.tensors for p in parts if isinstance(p, TensorDataset)]
    if len(tables) == len(parts):
        pool: Dataset = TensorDataset(*map(torch.cat, zip(*tables, strict=True)))
    else:
        pool = ConcatDataset(parts)
    first: dict[object, int] = {}
    for k in range(len_of(pool)):
        first.setdefault(_class(pool[k]), k)
    found = [*first.values()]
    chosen = [found[k] for k in evenly(len(found), FEW).tolist()]
    others = [k for k in range(len_of(pool)) if k not in chosen]
    more = evenly(len(others), FEW - len(chosen)).tolist()
    return some(pool, torch.tensor(chosen + [others[k] for k in more]))


def evenly(n: int, most: int) -> Tensor:
    """At most so many of the numbers below ``n``, evenly spread."""
    return torch.linspace(0, n - 1, min(n, most)).long()


def _class(item: Any) -> object:
    """What tells the class of an example from another's: its whole numbers and names, but for its input."""
    inside = (parts(item) or [])[isinstance(item, (tuple, list)) :]
    return tuple(label for part in inside for label in _labels(part))


def _labels(value: Any) -> Iterator[object]:
    if isinstance(value, Tensor):
        if not (value.is_floating_point() or value.dim()):
            yield int(value)
    elif isinstance(value, (int, str)):
        yield value
    else:
        for part in parts(value) or ():
            yield from _labels(part)


def stacks(solver: Solver, model: nn.Module, data: Dataset, recipe: Recipe) -> bool:
    """Whether two clients of equal size learn together what each learns alone, tried on a few examples.

    So that nothing has to be filled up. Statistics that a forward puts in a new place would stay behind.
    """
    if random(model, data, recipe):
        return True
    n = min(len_of(data), FEW)
    n -= n == 6  # no batch of one, which some models cannot take
    few = some(data, evenly(len_of(data), n))
    parts = [few, some(few, torch.arange(n).flip(0))]
    try:
        return difference(solver, model, parts, recipe) < TOLERANCE
    except Exception:  # whatever a model's own code may raise: training names it better
        return False


def fills_up(solver: Solver, model: nn.Module, data: Dataset, recipe: Recipe) -> bool:
    """Whether it shows that ``solver`` fills up batches, tried on clients of unequal size.

    ``data`` has examples of all kinds (``pooled``). What cannot be tried shows it.
    """
    n = min(len_of(data), FEW)
    if n < 2 or normalises(training(model)):
        return True
    if random(model, data, recipe):
        return False
    few = some(data, evenly(len_of(data), n))
    # no batch of one, which some models cannot take, where there are others
    sizes = {*(k for k in (n - 2, n // 2, n // 3) if k > 1 and k % 5 != 1)} | {max(1, n // 3)}
    short = itertools.cycle(sorted(sizes, reverse=True))
    # the first example of a client is what fills its batches up: each is one's first
    parts = [few, *(some(few, torch.arange(n).roll(-k)[: next(short)]) for k in range(n))]
    try:
        return not difference(solver, model, parts, recipe) < TOLERANCE
    except Exception:  # whatever a loss of one's own may raise for so few
        return True


def random(model: nn.Module, data: Dataset, recipe: Recipe) -> bool:
    """Whether clients alone and together may differ by what is drawn: on an accelerator they do."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        return False
    batch = to(fetch(data, torch.tensor([0, len_of(data) - 1])), device)
    found, before = [], snapshot(model)
    with torch.no_grad():
        for seed in (SEED, SEED + 1):
            with seeds.seeded(seed):
                found.append(recipe.tried(training(model), batch))
            load(model, before)
    return not torch.equal(*found)


def difference(
    solver: Solver, model: nn.Module, few: Sequence[Dataset], recipe: Recipe, private: bool = False
) -> float:
    """How far clients trained together are from each alone, over the length of the way; without noise.

    Of the weights or of the float buffers, which may see what the weights do not.
    """
    before = snapshot(model)
    try:
        weights = without_ties({k: before[k] for k, _ in model.named_parameters()})
        return distance(solver, model, few, before | weights, recipe, private)
    finally:
        load(model, before)  # the general path trains the module itself


def without_ties(state: Params) -> Params:
    """Weights to try with: none all alike, as zeros at the end of a branch and of the model hide it."""
    draw = torch.Generator().manual_seed(SEED)

    def moved(v: Tensor) -> Tensor:
        alike = v.numel() > 0 and v.is_floating_point() and bool((v == v.flatten()[0]).all())
        return v + 0.1 * torch.randn(v.shape, generator=draw).to(v) if alike else v

    return tmap(moved, state)


def distance(
    solver: Solver,
    model: nn.Module,
    few: Sequence[Dataset],
    state: Params,
    recipe: Recipe,
    private: bool,
) -> float:
    """The same from given weights; the model is changed."""
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    anchor = {k: state[k] for k in names}
    control = tmap(lambda v: v.sign() * 1e-3, anchor)  # control variates that are not zero
    extras = {g: control for g in recipe.strategy.init(anchor)}
    memory = {g: tmap(torch.neg, control) for g in recipe.strategy.remember(anchor)}
    task = Task(state, extras, 0, 0, 0.1)
    plans = [batch_order(len_of(d), STEPS, 0) for d in few]

    def run(solve: Solver, who: slice) -> list[Params]:
        own = plans[who]
        context = Context(
            expand(anchor),
            {g: expand(e) for g, e in extras.items()},
            {g: tmap(lambda v: v.expand(len(own), *v.shape), m) for g, m in memory.items()},
            torch.tensor([len(p) for p in own]),
            task.lr,
            (SEED,) * len(own),
        )
        noise: Any = None
        if private:
            streams = [stream("aes", 0, "trial") for _ in own]
            noise = PrivateSteps(0.1, 0.0, 5.0, streams, "alone")
        with seeds.seeded(SEED):
            chunk = Chunk(few[who], own, context, noise, (*context.seeds,))
            params, buffers = solve(model, chunk, task, recipe).rows()
        kinds = params, {} if private else buffers
        return [tmap(Tensor.clone, kind) for kind in kinds if kind]

    together, errors = run(solver, slice(None)), [0.0]
    for k in range(len(few)):
        for one, all_ in zip(run(general, slice(k, k + 1)), together, strict=True):
            between = sq_norms(tmap(change, one, expand(row(all_, k)))).sqrt()
            way = sq_norms(tmap(change, one, near({n: state[n] for n in one})))
            errors.append(float(between / way.nan_to_num(0, 0, 0).sqrt().clamp(min=1e-12)))
    return float(torch.tensor(errors).max())  # unlike Python's, it keeps NaN


def change(new: Tensor, old: Tensor) -> Tensor:
    """What was added; nothing where nothing was, to infinity and NaN as well."""
    return torch.where(same(new, old), 0, new.detach() - old)
