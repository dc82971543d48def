"""Whether clients can train side by side, and whether their batches may be filled up."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch import seeds
from fedtorch.checks.tried import first, shape, two_examples
from fedtorch.client import Client
from fedtorch.recipe import Recipe
from fedtorch.training.batches import Collated, len_of
from fedtorch.training.dropout import Drawing
from fedtorch.training.local_steps import one_by_one
from fedtorch.training.losses import reduce
from fedtorch.training.module import forward, snapshot, to, training, undropped
from fedtorch.training.outline import untouched
from fedtorch.training.stacked import vmapped_losses
from fedtorch.training.step import Stepping, pair
from fedtorch.tree import leaves, mapped, parts, rows, size


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
        return f"a batch of {n} holds a tensor {shape(odd[0])}, without a row for each example"
    return None


def _inmost(batch: Any) -> list[Any]:
    inside = parts(batch)
    return [batch] if inside is None else [v for part in inside for v in _inmost(part)]


def shapes_in(item: Any) -> tuple[tuple[int, ...], ...]:
    """The shape of everything in an example; of what is no tensor, none."""
    return tuple(shape for _, shape in types_and_shapes(item))


def types_and_shapes(item: Any) -> tuple[tuple[torch.dtype | None, tuple[int, ...]], ...]:
    """Type and shape of everything in an example; of what is no tensor, none."""
    return tuple((getattr(v, "dtype", None), tuple(getattr(v, "shape", ()))) for v in _inmost(item))


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
    # what is left by itself did not fail: whoever it was called by may have, later on
    hooks += [m.register_forward_hook(lambda *_: entered.pop() and None) for m in model.modules()]

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
        return f"layer {where} cannot be vectorised ({first(e)})"
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
