"""What of a model nothing here could train, average or copy, said before training."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fedtorch.training.module import snapshot
from fedtorch.training.outline import put_back
from fedtorch.tree import place
from fedtorch.types import ConfigError


def trainable(model: nn.Module) -> None:
    """Raises ConfigError naming weights or buffers that nothing here can train or average."""
    name = type(model).__name__
    lazy = UninitializedParameter, UninitializedBuffer
    if any(isinstance(t, lazy) for t in (*model.parameters(), *model.buffers())):
        raise ConfigError(f"model {name} has lazy layers; run one batch through it first")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        quantized = any("quantized" in type(m).__module__ for m in model.modules())
        fix = "quantized layers have none, hand over the model they were made from"
        usual = "call requires_grad_(True) on those that are to be trained"
        raise ConfigError(
            f"model {name} has no trainable parameters: {fix if quantized else usual}"
        )
    if any(p.is_complex() for p in params):
        raise ConfigError(
            f"model {name} has complex parameters, which are not supported: keep real ones of shape "
            "[..., 2], and let the forward make them complex (torch.view_as_complex)"
        )
    if loose := [k for k, p in model.named_parameters() if not p.is_leaf]:
        raise ConfigError(
            f"parameter {loose[0]} of model {name} is computed from others: detach it"
        )
    if watched := [k for k, p in model.named_parameters() if _hooked(p)]:
        raise ConfigError(
            f"parameter {watched[0]} of model {name} has a hook on its gradient, which a copy loses, and "
            "clients train copies: do the same in the model's forward or by a strategy's correct()"
        )
    if both := _overlapping(model):
        raise ConfigError(
            f"parameters {both[0]} and {both[1]} of model {name} lie in the same memory, and copies would "
            "part: make one parameter of it, and take views in forward"
        )
    if expanded := [k for k, p in model.named_parameters() if _expanded(p)]:
        raise ConfigError(
            f"parameter {expanded[0]} of model {name} is expanded, several of its numbers are one, and no "
            "step could move them apart: give it expand(...).contiguous(), or expand it in forward"
        )
    _plain_numbers(model)


def _plain_numbers(model: nn.Module) -> None:
    for k, v in (*model.named_parameters(), *model.named_buffers()):
        if not _strided(v) or v.is_meta:
            kind = "quantized" if v.is_quantized else "on device meta" if v.is_meta else "sparse"
            fix = "make it dense, or keep it as a plain attribute"
            if v.is_meta:
                fix = "make the model on a real device, or give it numbers (to_empty, then its weights)"
            raise ConfigError(
                f"{k} of model {type(model).__name__} is {kind}, and weights and buffers must be plain "
                f"numbers: {fix}"
            )


def _overlapping(model: nn.Module) -> tuple[str, str] | None:
    """Two parameters whose numbers lie in part in the same memory; one that two layers share is one."""
    lies: list[tuple[int, int, int, str]] = []
    for k, p in model.named_parameters():
        if p.device.type in ("cpu", "cuda") and _strided(p) and p.numel():
            room = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            start = int(p.storage_offset()) * p.element_size()
            lies.append((place(p), start, start + int(room) * p.element_size(), k))
    lies.sort()
    for one, other in itertools.pairwise(lies):
        if one[0] == other[0] and other[1] < one[2]:
            return one[3], other[3]
    return None


def _expanded(p: Tensor) -> bool:
    return _strided(p) and any(s == 0 < n - 1 for s, n in zip(p.stride(), p.shape, strict=True))


def _strided(v: Tensor) -> bool:
    return v.layout is torch.strided and not v.is_quantized


def _hooked(p: Tensor) -> bool:
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


def modes(model: nn.Module) -> list[str]:
    """What is to be said of parts that the model's owner has put in evaluation mode."""
    off = [name for name, m in model.named_modules() if not m.training]
    if not off:
        return []
    if len(off) == sum(1 for _ in model.modules()):
        return ["the model is in evaluation mode as a whole: clients train it in training mode"]
    more = f" and {len(off) - 1} more" if len(off) > 1 else ""
    return [f"in evaluation mode, and left so while clients train: {off[0] or 'the model'}{more}"]
