"""Try one batch before training starts, so that what does not fit is said in one sentence."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.batches import fetch, least, length
from fedtorch.client import Client, Recipe
from fedtorch.losses import Loss, reduce
from fedtorch.masks import Drawing
from fedtorch.modules import undropped
from fedtorch.privacy import SampleLevel
from fedtorch.solvers import forward, snapshot, to, together
from fedtorch.tree import rows
from fedtorch.types import ConfigError


class Classes(Protocol):
    """The part of ``fedtorch.data.Data`` that says which classes there are."""

    @property
    def train(self) -> Dataset:
        """Training examples."""

    @property
    def outputs(self) -> int:
        """Number of classes."""

    @property
    def labels(self) -> Tensor | None:
        """Class of each training example."""


def fits(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> None:
    """Run one small batch forward and backward; raises ConfigError naming what does not fit."""
    name = type(model).__name__
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise ConfigError(f"model {name} has lazy layers; run one batch through it first")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ConfigError(f"model {name} has no trainable parameters")
    if any(p.is_complex() for p in params):
        raise ConfigError(f"model {name} has complex parameters, which are not supported")
    client = clients[0]
    try:
        x, y = to(two_examples(client.data), params[0].device)
    except Exception as e:
        raise ConfigError(
            f"client {client.id}: a dataset must give (x, y) pairs, but taking a batch failed: {e}"
        ) from e
    before = snapshot(model)
    with seeds.seeded(0):
        try:
            output = forward(model.train(), x)
        except Exception as e:
            raise ConfigError(f"model {name} cannot take a batch {_shape(x)}: {e}") from e
        try:
            loss = reduce(recipe.loss(output, y))
        except ConfigError:
            raise
        except Exception as e:
            raise ConfigError(
                f"the loss does not fit model {name} (output {_shape(output)}) and the labels "
                f"{_shape(y)}: {e}"
            ) from e
        if not isinstance(loss, Tensor) or (loss.dim() and len(loss) != len(y)):
            raise ConfigError(
                "the loss must return a scalar or one number for each example, got "
                f"{_shape(loss)} for labels {_shape(y)}"
            )
        if not loss.requires_grad:
            raise ConfigError(f"the loss does not depend on the parameters of model {name}")
        loss.mean().backward()
    model.zero_grad()
    put_back(model, before)


def single(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> None:
    """A batch of one example, where a client has such a batch; raises ConfigError naming the client."""
    few = [c for c in clients if least(len(c), recipe) == 1]
    if not few or isinstance(recipe.privacy, SampleLevel):  # whose batches are drawn by chance
        return
    client, before = few[0], snapshot(model)
    x, y = to(fetch(client.data, torch.tensor([0])), next(model.parameters()).device)
    try:
        with torch.no_grad(), seeds.seeded(0):
            loss = reduce(recipe.loss(forward(model.train(), x), y))
            if loss.dim() and len(loss) != 1:
                raise ValueError(f"the loss gives {_shape(loss)} for one example")
    except Exception as e:
        fix = "leave out the last, smaller batch (drop_last), or take another batch_size"
        if recipe.batch_size == 1:
            fix = "take a larger batch_size"
        elif len(client) == 1:
            fix = "leave that client out"
        others = f", as have {len(few) - 1} more" if len(few) > 1 else ""
        raise ConfigError(
            f"client {client.id} has a batch of one example ({len(client)} examples, batch_size "
            f"{recipe.batch_size}){others}, and model {type(model).__name__} or its loss cannot train "
            f"on one ({type(e).__name__}: {e}): {fix}"
        ) from e
    finally:
        put_back(model, before)


def classes_fit(model: nn.Module, data: Classes) -> None:
    """A classifier needs an output for every label there is (a batch may miss the largest one)."""
    classes = data.outputs
    if (
        data.labels is not None
        and not 0 <= int(data.labels.min()) <= int(data.labels.max()) < classes
    ):
        raise ConfigError(
            f"the data names {classes} classes, but its labels go from {int(data.labels.min())} to "
            f"{int(data.labels.max())}: they must be 0 to {classes - 1}"
        )
    output, _ = _try(model, data.train)
    if not isinstance(output, Tensor):
        return  # a loss of the user's own knows what its parts mean
    if output.dim() < 2 or output.shape[1] < classes:
        raise ConfigError(
            f"model {type(model).__name__} gives {_shape(output)} for a batch of {len(output)}, but "
            f"the data has {classes} classes: it needs an output of {classes} for each example, on axis 1"
        )


def metrics_fit(model: nn.Module, data: Dataset, metrics: Mapping[str, Loss]) -> dict[str, Loss]:
    """Each metric must give a number for each example of a few, or one number for them all.

    Returns those that only the whole set can try: they give one number, or fail on a few (a score of
    classes, of examples that are all of one class).
    """
    whole: dict[str, Loss] = {}
    if not length(data):
        return whole
    for few in {min(2, length(data)), min(3, length(data))}:
        output, y = _try(model, data, few)
        for name, metric in metrics.items():
            try:
                value = reduce(metric(output, y)).double()
            except ConfigError:
                raise
            except Exception as e:
                if length(data) > few and getattr(metric, "whole_set", True):
                    whole[name] = metric
                    continue
                raise ConfigError(
                    f"metric {name} does not fit the output {_shape(output)} and the labels "
                    f"{_shape(y)}: {e}"
                ) from e
            if value.dim() and value.shape != (few,):
                raise ConfigError(
                    f"metric {name} must give one number for each example or one for all of them, got "
                    f"{_shape(value)} for {few} examples"
                )
            if not value.dim():
                whole[name] = metric
    return whole


def no_stacking(model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> str | None:
    """Why these clients cannot train side by side, or None when they can."""
    if not recipe.optimizer.elementwise:
        return f"optimizer {recipe.optimizer.name} does not work element by element"
    x, y = to(two_examples(clients[0].data), next(model.parameters()).device)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "the data is not a plain pair of tensors (x, y)"
    shapes = {tuple(c.data[0][0].shape) if hasattr(c.data[0][0], "shape") else () for c in clients}
    if len(shapes) > 1:
        return f"examples of clients differ in shape ({', '.join(map(str, sorted(shapes)))})"
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

    alike = x.device.type == "cpu" and not isinstance(recipe.privacy, SampleLevel)
    drawing = Drawing((0, 1) if alike else ())
    batch = x.expand(2, *x.shape), y.expand(2, *y.shape), torch.ones(2, len(x)).bool()
    try:
        with seeds.seeded(0):
            each = together(model.train(), recipe.loss, params, rest, batch, drawing)
        each.sum().backward()
    except Exception as e:
        where = entered[-1] if entered else "the model"
        return f"layer {where} cannot be vectorised ({str(e).splitlines()[0]})"
    finally:
        for hook in hooks:
            hook.remove()
    if alike and not _same_alone(model, x, y, recipe, each):
        return "alone a client's losses differ, as where something other than dropout draws numbers"
    return None


def _same_alone(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, losses: Tensor) -> bool:
    """Whether the losses of clients seeded with 0, 1, ... are those that were found side by side."""
    before = snapshot(model)
    try:
        with torch.no_grad():
            for seed, found in enumerate(losses):
                with seeds.seeded(seed):
                    alone = reduce(recipe.loss(forward(model.train(), x), y))
                if not _close(alone, found):
                    return False
        return True
    finally:
        put_back(model, before)


def mixes_examples(model: nn.Module, data: Dataset, recipe: Recipe) -> bool:
    """Whether an example's result depends on its neighbours (BatchNorm, a whole-batch loss)."""
    x, y = to(two_examples(data), next(model.parameters()).device)
    before = snapshot(model)
    try:
        with torch.no_grad(), seeds.seeded(0), undropped(model):
            output = forward(model, x)
            losses = reduce(recipe.loss(output, y))
            if losses.dim() == 0:
                return True
            # a longer batch shows a mean over it; a neighbour gone shows a maximum over it
            for index in ([0, 1, 0], [0, 0], [1, 1]):
                part = torch.tensor(index, device=y.device)
                other = forward(model, rows(x, part))
                pairs = (other, output), (reduce(recipe.loss(other, y[part])), losses)
                if not all(_close(rows(new, slice(2)), rows(old, part[:2])) for new, old in pairs):
                    return True
            return False
    finally:
        put_back(model, before)


def _close(new: Tensor, old: Tensor) -> bool:
    return torch.allclose(new, old, rtol=1e-3, atol=1e-5, equal_nan=True)


def _try(model: nn.Module, data: Dataset, few: int = 2) -> tuple[Any, Any]:
    x, y = fetch(data, torch.arange(min(few, length(data))))
    before = snapshot(model)
    was_training = model.training
    with torch.no_grad(), seeds.seeded(0):
        output = forward(model.eval(), x)
    model.train(was_training)
    put_back(model, before)
    return output, y


def two_examples(data: Dataset) -> tuple[Any, Any]:
    """A batch of two, or twice the only one."""
    # two examples even of a client that has one: BatchNorm cannot train on a single value
    return fetch(data, torch.tensor([0, length(data) - 1]))


def put_back(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Undo what a trial did to parameters and buffers."""
    with torch.no_grad():
        for k, v in (*model.named_parameters(), *model.named_buffers()):
            v.copy_(state[k])


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
