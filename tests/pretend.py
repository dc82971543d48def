"""A device that is none: its numbers are in this machine's memory, but meet no tensor of the CPU.

On a machine without an accelerator it shows what would fail on one: a tensor made on the wrong device, or
NumPy asked for numbers that are elsewhere. It knows nothing of speed, streams or an accelerator's kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretend"

aten = torch.ops.aten

MIXED = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor}
"""Operations that take tensors of two devices, the last an index of the CPU; any takes one number of it."""


class Far(Tensor):
    """A tensor of that device."""

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        """One with the numbers of ``near``."""
        where = near.shape, near.stride(), near.storage_offset()
        made = Tensor._make_wrapper_subclass(cls, *where, dtype=near.dtype, device=register())
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation of which a tensor is on the device."""
        return _run(func, args, kwargs or {})


@cache
def register() -> torch.device:
    """Make it known to torch, to the end of the process.

    To be called before autograd first runs, which is when that looks what devices there are.
    """
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    return torch.device(NAME, 0)


@contextmanager
def device(narrow: bool = False) -> Iterator[torch.device]:
    """The device, as long as it is there; ``narrow``: without float64, as Apple's."""
    with _Made(narrow), _Given():
        yield register()


def near(value: Any) -> Any:
    """The same numbers on the CPU."""
    return value.near if isinstance(value, Far) else value


class _Made(TorchDispatchMode):
    """Tensors that are made there, or moved."""

    narrow = False

    def __init__(self, narrow: bool) -> None:
        """Of which, by ``narrow``, none may be float64."""
        super().__init__()
        _Made.narrow = narrow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Given(TorchFunctionMode):
    """Tensors made of numbers, which no mode is asked about as an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and _is_far(kwargs.get("device")):
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(register())
        if func is Tensor.tolist:  # which torch has for its own tensors alone
            return near(args[0]).tolist()
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    out = _result(func, args, kwargs)
    if _Made.narrow and any(isinstance(t, Far) and t.dtype == torch.float64 for t in _tensors(out)):
        raise TypeError("the device has no float64")
    return out


def _result(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [*_tensors(args), *_tensors([*kwargs.values()])]
    far = any(isinstance(t, Far) for t in given)
    if not far and kwargs.get("device") is None:
        return func(*args, **kwargs)
    if far and func not in MIXED and any(t.dim() for t in given if not isinstance(t, Far)):
        raise RuntimeError(f"{func} of tensors on two devices")
    if func is aten.index.Tensor and far and not isinstance(args[0], Far):
        raise RuntimeError(f"{func} of a tensor of the CPU by an index that is not")
    asked = kwargs.get("device")
    if kwargs.get("generator") is not None and (far or _is_far(asked)):
        raise RuntimeError(f"{func} there by a generator that is here")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(*_mapped(near, args), **{k: _mapped(near, v) for k, v in kwargs.items()})
    if func._schema.is_mutable:  # it is one of the arguments
        known = {id(t.near): t for t in given if isinstance(t, Far)}
        return _mapped(lambda t: known.get(id(t), t), out)
    if _is_far(asked) or (far and asked is None):
        return _mapped(lambda t: Far(t) if isinstance(t, Tensor) else t, out)
    return out


def _tensors(value: Any) -> Iterator[Tensor]:
    # torch's own pytree takes several times as long as an operation on a few numbers
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _mapped(fn: Any, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(fn, part) for part in value])
    return fn(value)


def _is_far(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME
