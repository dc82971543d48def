"""Which solver trains, and how many clients at once: decided before the first round, by rule.

By rule and not by a stopwatch, so that a seed gives the same bits on a busy machine as on an idle one.
The rules stand on the measurements in ``benchmarks/RESULTS.md``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedtorch import fast, seeds
from fedtorch.checks import apart, modes, stacking
from fedtorch.checks import private as private_step
from fedtorch.checks.company import LARGEST_BATCH, Near, meets
from fedtorch.checks.crossing import loss_crosses
from fedtorch.checks.standins import shown
from fedtorch.checks.trial import fills_up, pooled, stacks
from fedtorch.client import Client
from fedtorch.fast.tuning import GROUP, MOST_CLIENTS, SMALL, SMALL_PRIVATE, STACKED_BYTES
from fedtorch.kernels.compile import FASTER, available
from fedtorch.kernels.processor import multiplies_bf16
from fedtorch.privacy import Privacy
from fedtorch.privacy.clipping import check_products
from fedtorch.recipe import Recipe
from fedtorch.training import stacked
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.losses import LOSSES
from fedtorch.training.module import forward, groups, to, undropped
from fedtorch.training.optimizer import ClientOptimizer
from fedtorch.training.outline import untouched
from fedtorch.tree import has_float64, nbytes
from fedtorch.types import ConfigError

SOLVERS = ("auto", "fast", "stacked", "general")

DTYPES = ("float32", "bf16")

EMULATED = (
    "this processor has no instructions for bfloat16, so that bf16 is several times slower than float32: "
    "leave engine.dtype out"
)


@dataclass(frozen=True)
class Choice:
    """How the clients of a session are trained."""

    solver: stacked.Solver
    chunk: int
    """Clients trained side by side."""
    recipe: Recipe
    """With the way to private gradients chosen, if there are any."""
    notes: tuple[str, ...] = ()
    group: int = 1
    """Clients trained one after another in one call, where they are not trained side by side."""
    strict: bool = False
    """Never pad a batch: the model or the loss mixes the examples of a batch."""


def choose(
    model: nn.Module,
    clients: Sequence[Client],
    recipe: Recipe,
    chunk: int | None,
    solver: str,
    dtype: str = "float32",
    changes: str | None = None,
) -> Choice:
    """The fastest way that trains this model rightly; raises ConfigError where ``solver`` cannot.

    ``changes``: what changes of the model as it runs, beside weights and buffers.
    """
    # what no solver can do
    half = check(solver, dtype, recipe)
    asked, plan = recipe.privacy, recipe.privacy.per_example
    size = min(chunk or _automatic(model), len(clients))
    notes = kept(model, asked, changes) + emulated(model, half)
    tried = shown(model, clients, recipe)
    alone = apart.needed(model, tried, recipe)
    private_step.fits(model, tried, recipe, alone)
    notes += private_step.warnings(clients, recipe.privacy)
    # the fast path, where it can and pays
    if solver in ("auto", "fast"):
        found = offered(model, tried, recipe, half, changes)
        if solver == "auto" and not half:
            found = unless_slower(found, model, tried, recipe, size)
        if not isinstance(found, str):
            size = chunk or found.chunk(max(len(c) for c in clients), recipe)
            how = f"fast path, up to {min(size, len(clients))} clients at once"
            if asked.strict:  # how many at once hangs on the largest client's examples
                how = "fast path"
            how += ", large products in bf16" if half else ""
            return Choice(found, size, recipe, (*notes, how + loops(model, recipe)))
        if solver == "fast":
            raise ConfigError(f"engine.solver fast cannot train this: {found}; use auto")
        if plan and plan.projected:
            raise ConfigError(f"privacy.projected needs the fast path: {found}; leave it out")
        notes.append(f"the fast path is not used: {found}")
    if plan and not available():
        notes.append(f"noise in every step is drawn by NumPy: {FASTER}")
    # else the way to gradients of examples, and one client after another or many
    recipe, size, how_noted = modes.with_mode(model, tried, recipe, size, alone)
    notes += how_noted
    if half:
        notes.append("clients train one after another under autocast to bf16")
        return Choice(stacked.Mixed(stacked.general), 1, recipe, tuple(notes))
    return otherwise(model, tried, recipe, chunk, solver, size, notes, changes)


def offered(
    model: nn.Module, clients: Sequence[Client], recipe: Recipe, half: bool, changes: str | None
) -> fast.Fast | str:
    """The fast path, or why it is none."""
    device = next(model.parameters()).device
    if not has_float64(device):
        return f"device {device.type} has no float64"
    if changes:
        return f"{changes} changes while the model runs"
    if any(c.sampler for c in clients):
        return "clients have a sampler"
    with untouched(model):  # to read a model is to run it with something other than tensors
        found = fast.offer(model, [c.data for c in clients], recipe, recipe.privacy, half)
    if isinstance(found, str) or not crowds(model, clients, recipe, LARGEST_BATCH):
        return found
    return "the loss looks at the whole batch, not at each example alone"


def kept(model: nn.Module, privacy: Privacy, changes: str | None) -> list[str]:
    """What to say of a model that keeps something; by sample-level privacy it is refused."""
    private, device = privacy.per_example, next(model.parameters()).device.type
    if private and not has_float64(next(model.parameters()).device):
        raise ConfigError(
            f"sample-level privacy needs float64, which device {device} has not: take engine.device cpu"
        )
    if private and any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise ConfigError(
            "sample-level privacy cannot see into a ScriptModule: hand over the nn.Module it was made from"
        )
    if not changes:
        return []
    if private:
        raise ConfigError(
            f"{changes} changes while the model runs: what an example leaves there reaches later steps "
            "past clipping and noise; keep nothing between calls (what is made once, make before the run)"
        )
    return [
        f"{changes} changes while the model runs: each client starts its round with what is there now, "
        "and it is not sent"
    ]


def otherwise(
    model: nn.Module,
    clients: Sequence[Client],
    recipe: Recipe,
    chunk: int | None,
    solver: str,
    size: int,
    notes: list[str],
    changes: str | None,
) -> Choice:
    """Stacked, ``size`` clients at once, where that is possible, or one after another."""
    plan = recipe.privacy.per_example
    private = plan and plan.mode
    alone = stacked.stacked if private == "stacked" else stacked.general
    strategy = recipe.strategy
    sums = not (recipe.needs_rows or strategy.confirms or strategy.trains)
    turns = (chunk or GROUP) if alone is stacked.general and sums else 1
    few = solver == "auto" and chunk is None and _automatic(model) < SMALL
    if size == 1 or (private is None and (solver == "general" or few)):
        return Choice(alone, 1, recipe, tuple(notes), turns)
    why = changes and f"{changes} changes while the model runs"
    if why := why or no_stacking(model, clients, recipe):
        if solver == "stacked":
            raise ConfigError(f"engine.solver stacked cannot train this: {why}; use auto")
        notes.append(f"clients train one after another: {why}")
        return Choice(alone, 1, recipe, tuple(notes), turns)
    strict = mixes(model, clients, recipe)
    if strict:
        notes.append(
            "model or loss looks at the whole batch: only clients whose batches are equally "
            "large train side by side"
        )
    return Choice(stacked.stacked, size, recipe, tuple(notes), strict=strict)


def no_stacking(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> str | None:
    """Why these clients cannot train side by side, or None when they can."""
    if why := stacking.no_stacking(model, clients, recipe):
        return why
    largest = max(clients, key=len)
    private = recipe.privacy.per_example  # whose mode has been tried
    if private or stacks(stacked.stacked, model, largest.data, recipe):
        return None
    plain = replace(recipe, optimizer=ClientOptimizer())
    adapts = recipe.client_optimizer != plain.client_optimizer
    if adapts and stacks(stacked.stacked, model, largest.data, plain):
        return (
            f"optimizer {recipe.client_optimizer.words} makes steps of what is only rounding, as in the "
            "gradient of a bias before BatchNorm, which is zero"
        )
    return (
        "alone a client learns something else, as where a forward puts a buffer in a new place, "
        "or a strategy draws from torch.rand and not from ctx.seeds"
    )


def mixes(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> bool:
    """Whether it would show that batches are filled up: examples are not looked at each alone."""
    data = pooled([c.data for c in clients])
    largest = max(clients, key=len)  # twice the only example of a small client would hide it
    if any(stacking.mixes_examples(model, d, recipe) for d in (data, largest.data)):
        return True
    if crowds(model, clients, recipe, min(recipe.batch_size or len(largest), len(largest))):
        return True
    unequal = len(largest) > min(map(len, clients))
    private = recipe.privacy.per_example  # which refuses what mixes
    return unequal and not private and fills_up(stacked.stacked, model, data, recipe)


def crowds(model: nn.Module, clients: Sequence[Client], recipe: Recipe, many: int) -> bool:
    """Whether a loss of the user's own lets examples meet in a batch of up to ``many``, of any classes.

    It is given the examples of all clients of a chunk at once.
    """
    if recipe.step is not None or recipe.loss in LOSSES.values():
        return False
    data = pooled([c.data for c in clients])
    x, y = to(fetch(data, torch.arange(len_of(data))), next(model.parameters()).device)
    if (
        recipe.privacy.per_example
    ):  # what shows that it mixes is refused; here it must not be able to
        return loss_crosses(model, (x, y), recipe)
    with untouched(model), undropped(model), torch.no_grad(), seeds.seeded(0):
        output = forward(model, x)
        return meets(recipe.loss, output, y, Near(1e-3, 1e-5), many, (1.0,))


def check(solver: str, dtype: str, recipe: Recipe) -> bool:
    """Refuse what there is not, by name; whether large products are in bfloat16."""
    if solver not in SOLVERS:
        raise ConfigError(f"engine.solver must be one of {', '.join(SOLVERS)}, not {solver!r}")
    if dtype not in DTYPES:
        raise ConfigError(f"engine.dtype must be {' or '.join(DTYPES)}, not {dtype!r}")
    plan = recipe.privacy.per_example
    if plan and plan.projected and solver not in ("auto", "fast"):
        raise ConfigError(f"privacy.projected needs the fast path, not engine.solver {solver}")
    if dtype == "bf16" and plan:
        raise ConfigError(
            "engine.dtype bf16 is not for sample-level privacy: the noise in every step needs float32"
        )
    if plan:
        check_products()
    return dtype == "bf16"


def unless_slower(
    found: fast.Fast | str, model: nn.Module, clients: Sequence[Client], recipe: Recipe, size: int
) -> fast.Fast | str:
    """Or why not: a front, which runs client after client, may be faster elsewhere; ``size``: stacked."""
    if isinstance(found, str) or found.chain.front is None:
        return found
    deep = 2 * found.chain.front.numbers > sum(p.numel() for p in model.parameters())
    if deep and groups(model) and next(model.parameters()).device.type == "cpu":  # W7
        return "GroupNorm in so deep a front is faster in PyTorch's own layout"
    least = SMALL_PRIVATE if recipe.privacy.per_example else SMALL
    if size >= least and modes.stacks(model, clients, recipe):
        return "so small a model with more than linear layers is faster with clients stacked"
    return found


def emulated(model: nn.Module, half: bool) -> list[str]:
    """What to say where products in bfloat16 are slow."""
    here = half and next(model.parameters()).device.type == "cpu"
    return [EMULATED] if here and not multiplies_bf16() else []


def loops(model: nn.Module, recipe: Recipe) -> str:
    """How the fast path's loops run, in words: on an accelerator noise in every step is the only one."""
    here = next(model.parameters()).device.type == "cpu"
    if not (here or recipe.privacy.per_example):
        return ""
    return ", compiled loops" if available() else f"; {FASTER}"


def _automatic(model: nn.Module) -> int:
    if next(model.parameters()).device.type != "cpu":
        return MOST_CLIENTS
    size = nbytes(model.parameters())
    return max(1, min(MOST_CLIENTS, STACKED_BYTES // max(size, 1)))
