"""Small services around one ``nn.Module``: weights in and out, inputs to it, tensors to its device."""

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from fedtorch.tree import leaves, mapped
from fedtorch.types import Params, Task

CPU = torch.device("cpu")


def forget(params: Mapping[str, Tensor]) -> None:
    """Drop the gradients, without the bookkeeping of ``optimizer.zero_grad()``."""
    for p in params.values():
        p.grad = None


def load(model: nn.Module, state: Params) -> None:
    """Copy parameters and buffers into the module, in place; buffers that a forward made stay."""
    buffers = {k: b for k, b in model.named_buffers() if k in state and b.shape == state[k].shape}
    both = dict(model.named_parameters()) | buffers
    if both:
        with torch.no_grad():
            torch._foreach_copy_([*both.values()], [state[k].to(v.device) for k, v in both.items()])


def to_device(task: Task, model: nn.Module) -> Task:
    """The task where the working model is."""
    device = next(model.parameters()).device
    if all(v.device == device for v in task.state.values()):
        return task
    return replace(task, state=to(task.state, device), extras=to(task.extras, device))


def snapshot(model: nn.Module) -> Params:
    """A copy of every parameter and buffer; tied weights appear once."""
    both = (*model.named_parameters(), *model.named_buffers())
    return {k: v.detach().clone() for k, v in both}


def statistics(model: nn.Module) -> set[str]:
    """Names of the running statistics that training moves: of a part in evaluation mode it moves none."""
    whole = not any(m.training for m in model.modules())
    return {
        f"{name}.{key}" if name else key
        for name, m in model.named_modules()
        if isinstance(m, _NormBase) and m.track_running_stats and (m.training or whole)
        for key in ("running_mean", "running_var")
    }


def buffers(model: nn.Module) -> set[str]:
    """Names of the module's buffers."""
    return {k for k, _ in model.named_buffers()}


def forward(model: nn.Module, x: Any) -> Any:
    """Call the model: a tuple of inputs is spread, a mapping goes by keyword."""
    if isinstance(x, (tuple, list)):
        return model(*x)
    return model(**x) if isinstance(x, Mapping) else model(x)


def other_types(model: nn.Module, batch: Any) -> str:
    """The fix, where numbers are of other types than a model takes; nothing where they are not."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    found = [t.dtype for t in leaves(batch)]
    name = str(own).removeprefix("torch.")
    if odd := [d for d in found if d.is_floating_point and d != own]:
        kind = str(odd[0]).removeprefix("torch.")
        return (
            f"; a batch holds {kind} and the weights are {name}: give the data as {name}, by "
            f"astype('{name}') of arrays and DataFrames, by to(torch.{name}) of tensors, or the model as "
            f"{kind}, by model.to(torch.{kind})"
        )
    if odd := [d for d in found if not d.is_floating_point and d != torch.int64]:
        kind = str(odd[0]).removeprefix("torch.")
        return f"; a batch holds {kind}: classes and places in a vocabulary must be int64, amounts {name}"
    return ""


def to(value: Any, device: torch.device) -> Any:
    """Move tensors, also inside tuples, lists, mappings and dataclasses."""
    return mapped(lambda t: t.to(device), value)


def training(model: nn.Module) -> nn.Module:
    """The model in training mode, and in it what its owner has put in evaluation mode left so.

    A frozen part keeps its statistics and drops nothing. A model that is in evaluation mode as a whole, as
    after loading or evaluating it, trains as a whole.
    """
    off = [m for m in model.modules() if not m.training]
    whole = len(off) == sum(1 for _ in model.modules())
    model.train()  # which a model may have its own idea of
    for m in () if whole else off:
        m.training = False
    return model


@contextmanager
def resting(model: nn.Module, names: Set[str]) -> Iterator[None]:
    """The model with these weights frozen."""
    still = [p for k, p in model.named_parameters() if k in names] if names else []
    try:
        for p in still:
            p.requires_grad_(False)
        yield
    finally:
        for p in still:
            p.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; each of its parts is put back in its own."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for m, was in modes:
            m.training = was


def channels_last(x: Tensor) -> Tensor:
    """Images [B, C, H, W] in channels-last memory, also where one channel leaves open what that would be.

    Convolutions and pooling are two to four times faster so on a CPU, and GroupNorm is slower. Other
    tensors as they are.
    """
    if x.dim() != 4:
        return x
    n, c, h, w = x.shape
    flat = x.permute(0, 2, 3, 1).contiguous()
    return flat.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def groups(model: nn.Module) -> bool:
    """Whether there is GroupNorm in it, which makes channels last the slower layout on a CPU."""
    return any(isinstance(m, nn.GroupNorm) for m in model.modules())


DROPOUT = {
    F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
}  # fmt: skip


class _Undropped(TorchFunctionMode):
    """Dropout called as a function gives back what it is given."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUT:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:  # its dropout_p is the fifth, or has a name
            return func(
                *args[:4], *((0.0,) if len(args) > 4 else ()), *args[5:], **_without_rate(kwargs)
            )
        return func(*args, **kwargs)


def _without_rate(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k != "dropout_p"}


@contextmanager
def undropped(model: nn.Module) -> Iterator[None]:
    """The model in training mode, but for what it drops at random: that differs from call to call."""
    with resting_dropout(model), _Undropped():
        yield


@contextmanager
def resting_dropout(model: nn.Module) -> Iterator[None]:
    """The same but for functions that it calls: for another model, inside of ``undropped`` of a first."""
    modes = [(m, m.training) for m in training(model).modules()]
    for m in model.modules():
        # those that have dropout inside of a single call are told by their type
        if "Dropout" in m._get_name() or isinstance(m, (nn.RNNBase, nn.MultiheadAttention)):
            m.eval()
    try:
        yield
    finally:
        for m, was in modes:
            m.training = was
