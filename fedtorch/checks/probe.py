"""Try a real step on one batch before training, so that what does not fit is said in one sentence."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedtorch import seeds
from fedtorch.checks.model import trainable
from fedtorch.checks.stacking import types_and_shapes
from fedtorch.checks.stays import generators, stays
from fedtorch.checks.tried import first, shape
from fedtorch.client import Client
from fedtorch.options import typed
from fedtorch.privacy import Nothing
from fedtorch.recipe import Recipe
from fedtorch.strategies.still import still
from fedtorch.training.batches import fetch, least, len_of, uncollated
from fedtorch.training.correction import Corrector
from fedtorch.training.local_steps import stepper
from fedtorch.training.losses import reduce
from fedtorch.training.module import forward, other_types, snapshot, to, training
from fedtorch.training.outline import untouched
from fedtorch.training.own_update import VisitBatches, own_update
from fedtorch.training.step import pair
from fedtorch.tree import expand, leaves
from fedtorch.types import ConfigError


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
    before, params = snapshot(model), dict(model.named_parameters())
    with untouched(model) as outline, seeds.seeded(0):
        take = _stepper(training(model), recipe) if recipe.local is None else None
        for client, index in _full_and_short(clients, recipe):
            if take is None:
                visit_alone(model, client, index, recipe)
                continue
            batch = _backward(model, client, index, recipe)
            take()
            _objective(model, batch, recipe)
        # after all steps, between which it would hide what they leave each other
        if take is not None:
            _unrecorded(model, batch, recipe)
        _made_anew(model, params)
        change, stay = outline.changed(), stays(model, before)
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
    return Found(change and change.what, (*stay, *generators(model)))


def _made_anew(model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
    """Raises ConfigError where running the model has made a parameter, exchanged one, or taken one away."""
    now = dict(model.named_parameters())
    if other := [k for k in {**params, **now} if params.get(k) is not now.get(k)]:
        raise ConfigError(
            f"parameter {other[0]} of model {type(model).__name__} is made, or goes, as the model runs, "
            "where nobody trains it: make it in __init__, or run one batch through the model first"
        )


def _full_and_short(clients: Sequence[Client], recipe: Recipe) -> Iterator[tuple[Client, Tensor]]:
    """A batch of the first client of each layout, and the smallest of more than one example of any."""
    if plan := recipe.privacy.per_example:  # batches are drawn by chance
        recipe = replace(recipe, privacy=Nothing(), batch_size=math.ceil(plan.batch_size))
    size = min(recipe.batch_size or len(clients[0]), len(clients[0]))
    # two examples even of a client that has one: BatchNorm cannot train on a single value
    full = clients[0], torch.arange(max(size, 2)) % size
    yield full
    # whose numbers are of another type or shape, where tables of tensors tell at once
    laid = [
        types_and_shapes(c.data[0]) if isinstance(c.data, TensorDataset) else () for c in clients
    ]
    kinds = dict(zip(reversed(laid), reversed(clients), strict=True))
    for client in [c for kind, c in kinds.items() if kind != laid[0]]:
        own = min(recipe.batch_size or len(client), len(client))
        yield client, torch.arange(max(own, 2)) % own
    rests = [(least(len(c), recipe), k) for k, c in enumerate(clients)]
    rest, k = min((r for r in rests if r[0] > 1), default=(size, 0))
    n = len(clients[k])
    # a second step in any case
    yield (clients[k], torch.arange(n - rest, n)) if rest != size else full


def _unrecorded(model: nn.Module, batch: Any, recipe: Recipe) -> None:
    """Raises ConfigError where a forward takes gradients, and none are recorded, as in every evaluation."""
    try:
        with torch.no_grad():
            recipe.tried(model, batch)
    except RuntimeError as e:
        if "does not require grad" in str(e):
            raise ConfigError(
                f"model {type(model).__name__} or its loss takes gradients as it runs, which fails where "
                f"none are recorded, as in evaluation ({first(e)}): put that part under "
                "torch.enable_grad()"
            ) from e
        raise


def _backward(model: nn.Module, client: Client, index: Tensor, recipe: Recipe) -> Any:
    """Leave the gradient of a batch in the model, or say what does not fit; returns the batch."""
    name, device = type(model).__name__, next(model.parameters()).device
    try:
        batch = to(fetch(client.data, index % len_of(client.data)), device)
    except Exception as e:
        raise ConfigError(
            f"client {client.id}: taking a batch of its dataset failed: {type(e).__name__}: {first(e)}"
            f"{uncollated(e)}"
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
            f"{shape(loss)} for {len(index)} examples"
        )
    if not torch.is_grad_enabled():
        raise ConfigError(
            "torch.no_grad() is on around the Server, and nothing could train: leave it"
        )
    if not loss.requires_grad:
        raise ConfigError(
            f"the loss does not depend on the parameters of model {name}: compute it from the output, "
            "without detach(), item() or torch.no_grad() in between"
        )
    model.zero_grad()
    try:
        loss.mean().backward()
    except Exception as e:
        raise ConfigError(f"the loss of model {name} has no gradient: {first(e)}") from e
    return batch


def _spread(e: Exception, x: Any) -> str:
    """The fix where a forward does not take the parts of an input as they are handed to it."""
    if not isinstance(e, TypeError) or isinstance(x, Tensor):
        return ""
    return (
        "; a dict goes into forward by its names, a tuple one by one: take them so, or call the model in a "
        "step, Recipe(step=fn)"
    )


def _flat(model: nn.Module, x: Any) -> str:
    """The fix where a model takes rows and is given pictures."""
    if not isinstance(x, Tensor) or x.dim() < 3:
        return ""
    try:
        forward(model, x.flatten(1))
    except Exception:
        return ""
    return "; it takes rows of numbers: put nn.Flatten() before its first layer"


def _asked(model: nn.Module, batch: Any, recipe: Recipe, who: str) -> Tensor:
    """Losses of a batch, or what part of them does not fit."""
    if recipe.step is None:
        return _by_loss(model, batch, recipe, who)
    try:
        return recipe.losses(model, batch)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(
            f"the step fails for model {type(model).__name__} and a batch {shape(batch)} of client {who}: "
            f"{type(e).__name__}: {first(e)}{_called(e, 'fn(model, batch)')}{other_types(model, batch)}"
        ) from e


def _by_loss(model: nn.Module, batch: Any, recipe: Recipe, who: str) -> Tensor:
    name = type(model).__name__
    try:
        x, y = pair(batch)
    except ConfigError as e:
        raise ConfigError(f"client {who}: {e}") from e
    try:
        output = forward(model, x)
    except Exception as e:
        whole = isinstance(x, Tensor) and x.dtype == torch.int64
        fix = "; x is int64, as of a vocabulary: amounts must be float32" if whole else ""
        fix = fix or _spread(e, x) or other_types(model, x) or _flat(model, x)
        raise ConfigError(
            f"model {name} cannot take a batch {shape(x)} of client {who}: {first(e)}{fix}"
        ) from e
    try:
        found = reduce(recipe.loss(output, y))
    except ConfigError:
        raise
    except Exception as e:
        swapped = _called(
            TypeError() if _takes(recipe.loss, y, output) else e, "loss(output, target)"
        )
        fix = swapped or _no_classes(output, y) or _whole_labels(output, y) or other_types(model, y)
        raise ConfigError(
            f"the loss does not fit model {name} (output {shape(output)}) and the labels "
            f"{shape(y)}: {first(e)}{fix}"
        ) from e
    if _spread_out(recipe, output, y, found):
        raise ConfigError(
            f"the loss holds each output of model {name} ({shape(output)}) to every label ({shape(y)}), "
            f"as shapes that differ are broadcast{ONE_AXIS}"
        )
    return found


def _called(e: Exception, how: str) -> str:
    """The fix where a function does not take what it is given."""
    return f"; it is called as {how}" if isinstance(e, TypeError) else ""


def _takes(loss: Any, output: Any, target: Any) -> bool:
    try:
        loss(output, target)
    except Exception:
        return False
    return True


def _whole_labels(output: Any, target: Any) -> str:
    """What to do where labels are whole and stand beside outputs that are not."""
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        return ""
    whole = not target.is_floating_point() and output.is_floating_point()
    if not whole or output.shape != target.shape:
        return ""
    kind = str(target.dtype).removeprefix("torch.")
    return f"; the labels are {kind}, and this loss may want them as the outputs are: y.float()"


ONE_AXIS = "; give the labels as [N, 1], y[:, None], or end the model with nn.Flatten(0)"


def _spread_out(recipe: Recipe, output: Any, target: Any, found: Tensor) -> bool:
    """Whether a loss of [B, 1] and [B] is another than of two that are of one shape."""
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)) or len(output) < 2:
        return False
    if {output.dim(), target.dim()} != {1, 2} or output.numel() != target.numel():
        return False
    try:
        with torch.no_grad():
            other = reduce(recipe.loss(output.detach().reshape(target.shape), target))
    except Exception:  # which takes nothing but the shapes it was given
        return False
    return found.shape != other.shape or not torch.allclose(found.detach(), other, rtol=1e-3)


def _no_classes(output: Any, target: Any) -> str:
    """The fix, where targets that lie as classes do are not of their type."""
    if isinstance(target, (tuple, list)) and target and all(isinstance(t, str) for t in target):
        return "; the labels are text: number the classes, 0, 1, ..."
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return ""
    if {output.dim(), target.dim()} == {1, 2} and output.numel() == target.numel():
        return ONE_AXIS
    if output.dim() < 2 or (len(output), *output.shape[2:]) != target.shape:
        return ""
    if target.dtype == torch.int64:
        return f"; of {output.shape[1]} outputs the classes are 0 to {output.shape[1] - 1}"
    kind = str(target.dtype).removeprefix("torch.")
    return f"; the labels are {kind}, and classes must be int64: y.long(), y.astype('int64')"


def _objective(model: nn.Module, batch: Any, recipe: Recipe) -> None:
    """Raises ConfigError where a strategy that changes what is minimised cannot, for this model."""
    strategy = recipe.strategy
    if not strategy.contrasts:
        return
    start = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    try:
        asked = strategy.objective(recipe.asked, still(strategy, start, strategy.init(start)))
        reduce(asked(model, batch)).mean().backward()
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(
            f"the objective of strategy {typed(strategy)} fails for model {type(model).__name__}: "
            f"{type(e).__name__}: {first(e)}"
        ) from e


def visit_alone(model: nn.Module, client: Client, index: Tensor, recipe: Recipe) -> None:
    """A visit of two batches by a local update of the user's own; raises ConfigError where it fails."""
    plan = (index % len_of(client.data)).expand(2, -1)
    visit = VisitBatches(client.data, plan, next(model.parameters()).device)
    assert recipe.local is not None
    try:
        own_update(recipe.local, training(model), visit, recipe.learning_rate)
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(
            f"local fails for model {type(model).__name__} and two batches of {len(index)} of client "
            f"{client.id}: {type(e).__name__}: {first(e)}"
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
            f"strategy {type(strategy).__name__} cannot correct gradients of model {name}: {first(e)}"
        ) from e
    try:
        step = stepper(recipe, model, params, recipe.learning_rate, 2)
    except ConfigError:
        raise
    except Exception as e:
        fix = "; it is called as fn(model, lr)"
        if isinstance(recipe.client_optimizer.maker(), type):
            fix = "; a function fn(model, lr) may give several optimizers"
        raise ConfigError(f"{client} cannot train model {name}: {first(e)}{fix}") from e

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
            raise ConfigError(f"{who} cannot take a step of model {name}: {first(e)}{fix}") from e

    return take
