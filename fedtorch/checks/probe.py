"""Try one batch before training starts, so that what does not fit is said in one sentence."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.client import Client
from fedtorch.privacy import Nothing
from fedtorch.recipe import Recipe
from fedtorch.strategies.base import still
from fedtorch.training.batches import Collated, fetch, least, len_of, uncollated
from fedtorch.training.correction import Corrector
from fedtorch.training.dropout import Drawing
from fedtorch.training.local_steps import one_by_one, stepper
from fedtorch.training.losses import Loss, gathers, reduce
from fedtorch.training.module import other_types, training, undropped
from fedtorch.training.outline import put_back as put_back
from fedtorch.training.outline import untouched
from fedtorch.training.own_update import Visit, own_update
from fedtorch.training.stacked import forward, snapshot, to, vmapped_losses
from fedtorch.training.step import Stepping, pair
from fedtorch.tree import expand, leaves, mapped, parts, rows, size
from fedtorch.types import ConfigError, Params


class Found(NamedTuple):
    """What a trial of two steps shows of a model that trains."""

    changes: str | None
    """What changes as it runs, apart from its weights and the numbers in its buffers."""
    notes: tuple[str, ...]
    """What is to be said."""


def fits(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> Found:
    """Take a real step on a full batch and on the shortest; raises ConfigError naming what does not fit.

    The model is left as it was.
    """
    trainable(model)
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    before = snapshot(model)
    with untouched(model) as outline, seeds.seeded(0):
        take = _stepper(training(model), recipe) if recipe.local is None else None
        for client, index in _full_and_short(clients, recipe):
            if take is None:
                visit_alone(model, client, index, recipe)
                continue
            _backward(model, client, index, recipe)
            take()
        change, stay = outline.changed(), _not_averaged(model, before)
    if other := trained ^ {k for k, p in model.named_parameters() if p.requires_grad}:
        raise ConfigError(
            f"parameter {min(other)} of model {type(model).__name__} is frozen or unfrozen as the model "
            "runs: set requires_grad before training, or detach its output"
        )
    if change and change.saved:
        raise ConfigError(
            f"{change.what} is made, or takes another shape, as the model runs, and the server's model "
            "would not have it: run one batch through the model first, or register it with "
            "persistent=False"
        )
    return Found(change and change.what, stay)


def _not_averaged(model: nn.Module, before: Params) -> tuple[str, ...]:
    """A sentence for buffers that changed, and of which there is no mean but of numbers with a point."""
    found = [
        k
        for k, b in model.named_buffers()
        if not b.is_floating_point() and k in before and not torch.equal(b, before[k])
        if not k.endswith("num_batches_tracked")
    ]
    if not found:
        return ()
    kind = str(model.get_buffer(found[0]).dtype).removeprefix("torch.")
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"buffer {found[0]} ({kind}){more} changes as clients train and is not averaged: each starts "
        "from the server's, which stays as it is (a buffer of floats would be averaged)",
    )


def trainable(model: nn.Module) -> None:
    """Raises ConfigError naming weights or buffers that nothing here can train or average."""
    name = type(model).__name__
    lazy = UninitializedParameter, UninitializedBuffer
    if any(isinstance(t, lazy) for t in (*model.parameters(), *model.buffers())):
        raise ConfigError(f"model {name} has lazy layers; run one batch through it first")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ConfigError(f"model {name} has no trainable parameters")
    if any(p.is_complex() for p in params):
        raise ConfigError(f"model {name} has complex parameters, which are not supported")
    if loose := [k for k, p in model.named_parameters() if not p.is_leaf]:
        raise ConfigError(
            f"parameter {loose[0]} of model {name} is computed from others: detach it"
        )
    if hooked := [k for k, p in model.named_parameters() if hooks(p)]:
        raise ConfigError(
            f"parameter {hooked[0]} of model {name} has a hook on its gradient, which a copy loses, and "
            "clients train copies: do the same in the model's forward or by a strategy's correct()"
        )
    for k, v in (*model.named_parameters(), *model.named_buffers()):
        if v.layout is not torch.strided or v.is_quantized or v.is_meta:
            kind = "quantized" if v.is_quantized else "on device meta" if v.is_meta else "sparse"
            raise ConfigError(
                f"{k} of model {name} is {kind}, and weights and buffers must be plain numbers: make it "
                "dense, or keep it as a plain attribute"
            )


def hooks(p: Tensor) -> bool:
    """Whether something else happens as its gradient comes."""
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))


@contextmanager
def aside(model: nn.Module, local: bool = False) -> Iterator[None]:
    """While a copy is tried, no gradient may reach the model itself; raises ConfigError where one does.

    A lambda that it keeps, or a loss, may hold the model that was handed over: training would not move it.
    A ``local`` update may even train it, which is undone.
    """
    weights = snapshot(model) if local else {}
    before = [
        (k, p, p.grad, p.grad.clone() if p.grad is not None else None)
        for k, p in model.named_parameters()
    ]
    yield
    for name, p, grad, numbers in before:
        if p.grad is grad and (numbers is None or grad is None or torch.equal(grad, numbers)):
            continue
        for _, q, old, was in before:
            q.grad = old if old is None or was is None else old.copy_(was)
        put_back(model, weights)
        if local:
            raise ConfigError(
                f"local trains parameter {name} of the very model handed over, but clients train copies: "
                "take the model from its first argument"
            )
        raise ConfigError(
            f"the loss or step, or a function that model {type(model).__name__} keeps, uses parameter "
            f"{name} of the very model handed over, but clients train copies of it, which it would not "
            "touch: let a step, Recipe(step=fn), use the model that it is given, or make it a method"
        )


def _full_and_short(clients: Sequence[Client], recipe: Recipe) -> Iterator[tuple[Client, Tensor]]:
    """The first client's batch, and the smallest of more than one example that any client takes."""
    if plan := recipe.privacy.per_example:  # batches are drawn by chance
        recipe = replace(recipe, privacy=Nothing(), batch_size=math.ceil(plan.batch_size))
    size = min(recipe.batch_size or len(clients[0]), len(clients[0]))
    # two examples even of a client that has one: BatchNorm cannot train on a single value
    full = clients[0], torch.arange(max(size, 2)) % size
    yield full
    rests = [(least(len(c), recipe), k) for k, c in enumerate(clients)]
    rest, k = min((r for r in rests if r[0] > 1), default=(size, 0))
    n = len(clients[k])
    yield (
        (clients[k], torch.arange(n - rest, n)) if rest != size else full
    )  # a second step in any case


def _backward(model: nn.Module, client: Client, index: Tensor, recipe: Recipe) -> None:
    """Leave the gradient of a batch in the model, or say what does not fit."""
    name, device = type(model).__name__, next(model.parameters()).device
    try:
        batch = to(fetch(client.data, index % len_of(client.data)), device)
    except Exception as e:
        raise ConfigError(
            f"client {client.id}: taking a batch of its dataset failed: {_first(e)}{uncollated(e)}"
        ) from e
    if any(t.requires_grad for t in leaves(batch)):
        raise ConfigError(
            f"client {client.id}: its dataset gives tensors that require grad, and what made them is not "
            "trained here: give them detached, x.detach()"
        )
    loss = _asked(model, batch, recipe, client.id)
    what = "loss" if recipe.step is None else "step"
    if not isinstance(loss, Tensor) or (loss.dim() and len(loss) != len(index)):
        raise ConfigError(
            f"the {what} must return a scalar or one number for each example, got "
            f"{_shape(loss)} for {len(index)} examples"
        )
    if not loss.requires_grad:
        raise ConfigError(f"the loss does not depend on the parameters of model {name}")
    model.zero_grad()
    try:
        loss.mean().backward()
    except Exception as e:
        raise ConfigError(f"the loss of model {name} has no gradient: {_first(e)}") from e


def _asked(model: nn.Module, batch: Any, recipe: Recipe, who: str) -> Tensor:
    """Losses of a batch, or what part of them does not fit."""
    name = type(model).__name__
    if recipe.step is not None:
        try:
            return recipe.losses(model, batch)
        except ConfigError:
            raise
        except Exception as e:
            raise ConfigError(
                f"the step fails for model {name} and a batch {_shape(batch)} of client {who}: "
                f"{type(e).__name__}: {_first(e)}{other_types(model, batch)}"
            ) from e
    try:
        x, y = pair(batch)
    except ConfigError as e:
        raise ConfigError(f"client {who}: {e}") from e
    try:
        output = forward(model, x)
    except Exception as e:
        whole = isinstance(x, Tensor) and x.dtype == torch.int64
        fix = "; x is int64, as of a vocabulary: amounts must be float32" if whole else ""
        fix = fix or other_types(model, x)
        raise ConfigError(f"model {name} cannot take a batch {_shape(x)}: {_first(e)}{fix}") from e
    try:
        return reduce(recipe.loss(output, y))
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(
            f"the loss does not fit model {name} (output {_shape(output)}) and the labels "
            f"{_shape(y)}: {_first(e)}{other_types(model, y)}"
        ) from e


def visit_alone(model: nn.Module, client: Client, index: Tensor, recipe: Recipe) -> None:
    """A visit of two batches by a local update of the user's own; raises ConfigError where it fails."""
    plan = (index % len_of(client.data)).expand(2, -1)
    visit = Visit(client.data, plan, next(model.parameters()).device)
    assert recipe.local is not None
    try:
        own_update(recipe.local, training(model), visit, recipe.learning_rate)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(
            f"local fails for model {type(model).__name__} and two batches of {len(index)} of client "
            f"{client.id}: {type(e).__name__}: {_first(e)}"
        ) from e


def _stepper(model: nn.Module, recipe: Recipe) -> Callable[[], None]:
    """What takes an optimizer's step as training will, with what the strategy makes of the gradient."""
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    name, strategy = type(model).__name__, recipe.strategy
    client = f"client optimizer {recipe.client_optimizer.words}"
    start = {k: p.detach().clone() for k, p in params.items()}
    context = replace(still(strategy, start, strategy.init(start)), lr=recipe.learning_rate)
    views = expand({k: p.detach() for k, p in params.items()})
    try:
        correct = Corrector(strategy, context)
    except Exception as e:
        raise ConfigError(
            f"strategy {type(strategy).__name__} cannot correct gradients of model {name}: {_first(e)}"
        ) from e
    try:
        step = stepper(recipe, model, params, recipe.learning_rate, 2)
    except ConfigError:
        raise
    except Exception as e:
        fix = "; it is called as fn(model, lr)"
        if isinstance(recipe.client_optimizer.maker(), type):
            fix = "; a function fn(model, lr) may give several optimizers"
        raise ConfigError(f"{client} cannot train model {name}: {_first(e)}{fix}") from e

    def take() -> None:
        sparse = [k for k, p in params.items() if p.grad is not None and p.grad.is_sparse]
        who = f"strategy {type(strategy).__name__}"
        try:
            if correct:
                correct(params, views)
            who = client
            step()
        except Exception as e:
            fix = (
                f"; the gradient of {sparse[0]} is sparse, leave out sparse=True" if sparse else ""
            )
            raise ConfigError(f"{who} cannot take a step of model {name}: {_first(e)}{fix}") from e

    return take


def modes(model: nn.Module) -> list[str]:
    """What is to be said of parts that the model's owner has put in evaluation mode."""
    off = [name for name, m in model.named_modules() if not m.training]
    if not off:
        return []
    if len(off) == sum(1 for _ in model.modules()):
        return ["the model is in evaluation mode as a whole: clients train it in training mode"]
    more = f" and {len(off) - 1} more" if len(off) > 1 else ""
    return [f"in evaluation mode, and left so while clients train: {off[0] or 'the model'}{more}"]


def classes_fit(model: nn.Module, train: Dataset, labels: Tensor | None, classes: int) -> None:
    """A classifier needs an output for every label there is (a batch may miss the largest one)."""
    if classes < 2:
        raise ConfigError("every target is of one class: there is nothing to learn")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ConfigError(
            f"the data names {classes} classes, but its labels go from {int(labels.min())} to "
            f"{int(labels.max())}: they must be 0 to {classes - 1}"
        )
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        return
    try:
        with _output(model, train) as (output, _):
            found = output
    except Exception:  # the trial of training says what is wrong with a model that does not run
        return
    if isinstance(found, Tensor) and (found.dim() < 2 or found.shape[1] < classes):
        raise ConfigError(
            f"model {type(model).__name__} gives {_shape(found)} for a batch of {len(found)}, but the data "
            f"has {classes} classes: it needs an output of {classes} for each example, on axis 1"
        )


def metrics_fit(model: nn.Module, data: Dataset, metrics: Mapping[str, Loss]) -> dict[str, Loss]:
    """Each metric must give a number for each example of a few, or one number for them all.

    Returns those that only the whole set can try: they give one number, or fail on a few (a score of
    classes, of examples that are all of one class).
    """
    # those by name know of sets what one batch cannot have, those of others may not
    gathering = {k: m for k, m in metrics.items() if gathers(m)}
    named = {k for k, m in gathering.items() if hasattr(m, "whole_set")}
    whole = {k: m for k, m in gathering.items() if k not in named}
    if not len_of(data):
        return {}
    for few in {min(2, len_of(data)), min(3, len_of(data))}:
        with _output(model, data, few) as (output, y):
            for name, metric in metrics.items():
                if name in gathering and name not in named:
                    continue
                try:
                    value = reduce(metric(output, y)).cpu().double()
                except ConfigError:
                    raise
                except Exception as e:
                    if len_of(data) > few and getattr(metric, "whole_set", True):
                        whole[name] = metric
                        continue
                    raise ConfigError(
                        f"metric {name} does not fit the output {_shape(output)} and the labels "
                        f"{_shape(y)}: {_first(e)}"
                    ) from e
                if value.dim() and value.shape != (few,):
                    raise ConfigError(
                        f"metric {name} must give one number for each example or one for all of them, got "
                        f"{_shape(value)} for {few} examples"
                    )
                if not value.dim() and name not in named:
                    whole[name] = metric
    return whole


def no_stacking(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> str | None:
    """Why these clients cannot train side by side, or None when they can."""
    if why := one_by_one(recipe):
        return why
    if any(isinstance(c.data, Collated) for c in clients):
        return "data has a collate or num_workers of its own"
    if any(c.sampler for c in clients):
        return "clients have a sampler"
    batch = to(two_examples(clients[0].data), next(model.parameters()).device)
    if why := uneven(batch):
        return why
    shapes = {shapes_in(c.data[0]): None for c in clients}
    if len(shapes) > 1:
        some = ", ".join(str(s[0] if len(s) == 1 else s) for s in [*shapes][:2])
        return f"examples of clients differ in shape ({some})"
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return "it is scripted, which torch.func cannot follow"
    return _no_vmap(model, batch, recipe)


def uneven(batch: Any) -> str | None:
    """Why a batch cannot be laid beside others, or None where it is tensors with a row for each example."""
    if other := [v for v in _inmost(batch) if not isinstance(v, Tensor)]:
        return f"a batch holds a {type(other[0]).__name__}, and not tensors alone"
    n = size(batch)
    if odd := [t for t in leaves(batch) if not t.dim() or len(t) != n]:
        return f"a batch of {n} holds a tensor {_shape(odd[0])}, without a row for each example"
    return None


def _inmost(batch: Any) -> list[Any]:
    inside = parts(batch)
    return [batch] if inside is None else [v for part in inside for v in _inmost(part)]


def shapes_in(item: Any) -> tuple[tuple[int, ...], ...]:
    """The shape of everything in an example; of what is no tensor, none."""
    return tuple(tuple(getattr(v, "shape", ())) for v in _inmost(item))


def _no_vmap(model: nn.Module, batch: Any, recipe: Recipe) -> str | None:
    """Why a step of two clients side by side fails or differs from one alone, or None."""
    state = snapshot(model)
    names = {k for k, p in model.named_parameters() if p.requires_grad}
    stack = {k: v.expand(2, *v.shape).clone() for k, v in state.items()}
    params = {k: v.requires_grad_() for k, v in stack.items() if k in names}
    rest = {k: v for k, v in stack.items() if k not in names}
    entered: list[str] = []
    hooks = [
        m.register_forward_pre_hook(
            lambda m, _, n=n: entered.append(f"{n or 'the model'} ({m._get_name()})")
        )
        for n, m in model.named_modules()
    ]

    device = next(model.parameters()).device
    alike = device.type == "cpu" and not recipe.privacy.per_example
    drawing = Drawing((0, 1) if alike else ())
    twice = mapped(lambda t: t.expand(2, *t.shape), batch)
    mask, stepping = torch.ones(2, size(batch)).bool(), Stepping(training(model), recipe.asked)
    try:
        with untouched(model), seeds.seeded(0):
            each = vmapped_losses(stepping, params, rest, twice, mask, drawing)
        each.sum().backward()
    except Exception as e:
        where = entered[-1] if entered else "the model"
        return f"layer {where} cannot be vectorised ({_first(e)})"
    finally:
        for hook in hooks:
            hook.remove()
    if alike and not _same_alone(model, batch, recipe, each):
        return "alone a client's losses differ, as where something other than dropout draws numbers"
    return None


def _same_alone(model: nn.Module, batch: Any, recipe: Recipe, losses: Tensor) -> bool:
    """Whether the losses of clients seeded with 0, 1, ... are those that were found side by side."""
    with untouched(model), torch.no_grad():
        for seed, found in enumerate(losses):
            with seeds.seeded(seed):
                alone = recipe.tried(training(model), batch)
            if not _close(alone, found):
                return False
    return True


def mixes_examples(model: nn.Module, data: Dataset, recipe: Recipe) -> bool:
    """Whether an example's result depends on its neighbours (BatchNorm, a whole-batch loss)."""
    batch = to(two_examples(data), next(model.parameters()).device)
    full = min(recipe.batch_size or len_of(data), len_of(data))
    with untouched(model), torch.no_grad(), seeds.seeded(0), undropped(model):
        output, losses = _given(model, batch, recipe)
        if losses.dim() == 0:
            return True
        # a longer batch shows a mean over it; a neighbour gone shows a maximum over it; a full one, what
        # happens there alone
        each = [True] * len(leaves(output))
        for index in ([0, 1, 0], [0, 0], [1, 1], [k % 2 for k in range(max(full, 2))]):
            part = torch.tensor(index, device=losses.device)
            other, found = _given(model, rows(batch, part), recipe)
            pairs = [*zip(leaves(other), leaves(output), strict=True)]
            # what else a model gives, a mean or a constant, has other sizes than the batch
            each = [
                e and n.shape == (len(index), *o.shape[1:])
                for e, (n, o) in zip(each, pairs, strict=True)
            ]
            pairs = [pair for e, pair in zip(each, pairs, strict=True) if e]
            pairs.append((found, losses))
            if not all(_close(new[:2], old[part[:2]]) for new, old in pairs):
                return True
        return False


def _given(model: nn.Module, batch: Any, recipe: Recipe) -> tuple[Any, Tensor]:
    """What the model gives, where that is to be seen, and the losses."""
    if recipe.step is not None:
        return (), recipe.tried(model, batch)
    x, y = pair(batch)
    output = forward(model, x)
    return output, reduce(recipe.loss(output, y))


def _close(new: Tensor, old: Tensor) -> bool:
    return torch.allclose(new, old, rtol=1e-3, atol=1e-5, equal_nan=True)


@contextmanager
def _output(model: nn.Module, data: Dataset, few: int = 2) -> Iterator[tuple[Any, Any]]:
    """What the model gives for a few examples in evaluation, and their labels; it is left as it was."""
    x, y = to(fetch(data, torch.arange(min(few, len_of(data)))), next(model.parameters()).device)
    with untouched(model), torch.no_grad(), seeds.seeded(0):
        try:
            output = forward(model.eval(), x)
        except Exception as e:
            raise ConfigError(
                f"model {type(model).__name__} cannot take a batch {_shape(x)} in evaluation: {_first(e)}"
            ) from e
        yield output, y


def two_examples(data: Dataset) -> Any:
    """A batch of two, or twice the only one."""
    # two examples even of a client that has one: BatchNorm cannot train on a single value
    return fetch(data, torch.tensor([0, len_of(data) - 1]))


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _first(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
