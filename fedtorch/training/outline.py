"""A module apart from its weights: copies of it, and what a forward changes of it, put back.

Layers of PyTorch keep nothing from call to call but in buffers. Others keep a hidden state, a cache or a
counter as an attribute, or make buffers as they run.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedtorch.training.module import snapshot
from fedtorch.types import ConfigError, Params

TORCHS = {*vars(nn.Module())}
"""What every module has: parameters, buffers, hooks and the mode."""


class Submodule(NamedTuple):
    """One submodule as it was."""

    name: str
    module: nn.Module
    entries: dict[str, tuple[Any, Any]]
    """Its attributes, and what was in those that hold something."""
    shapes: dict[str, tuple[torch.Size, torch.dtype]]
    """Of its buffers."""


class Change(NamedTuple):
    """What of a module is not as it was."""

    what: str
    saved: bool
    """It has a place in the model's ``state_dict``."""


class Outline:
    """Attributes, buffers and modes of a module and its submodules, to be compared and put back.

    Of parameters and buffers only which tensors they are, not the numbers in them. Containers are looked
    into one level deep.
    """

    def __init__(self, model: nn.Module, own: bool = False) -> None:
        """``own``: only of submodules whose code or hooks are not PyTorch's, as the others keep nothing."""
        self._parts = [
            Submodule(name, module, _entries(module), _shapes(module))
            for name, module in model.named_modules()
            if not (own and _is_torchs(module)) and not isinstance(module, torch.jit.ScriptModule)
        ]
        self._modes = [(m, m.training) for m in model.modules()] if not own else []

    def restore(self) -> None:
        """Put everything back as it was."""
        for _, module, entries, shapes in self._parts:
            table = vars(module)
            for key in table.keys() - entries.keys():
                del table[key]
            for key, (value, content) in entries.items():
                table[key] = value
                if not _as_was(value, content):
                    _refill(value, content)
            for key, (shape, _) in shapes.items():
                buffer = module.get_buffer(key)
                if buffer.shape != shape:  # made larger in place
                    buffer.resize_(shape)
        for module, training in self._modes:
            module.training = training

    def changed(self) -> Change | None:
        """The first thing that is not as it was, if there is one."""
        for name, module, entries, shapes in self._parts:
            where = f"layer {name or 'the model'} ({type(module).__name__})"
            now = _shapes(module)
            for key in {**shapes, **now}:
                if shapes.get(key) != now.get(key):
                    return Change(
                        f"buffer {key} of {where}", key not in module._non_persistent_buffers_set
                    )
            passed = TORCHS | _computed(module)
            for key, value in vars(module).items():
                old, content = entries.get(key, (ABSENT, None))
                if not (key in passed or (_same(old, value) and _as_was(old, content))):
                    return Change(f"attribute {key} of {where}", False)
        return None


ABSENT = object()


@contextmanager
def untouched(model: nn.Module) -> Iterator[Outline]:
    """Try something with a model: in the end, also by an error, all of it is as it was, gradients too."""
    outline, before = Outline(model), snapshot(model)
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        yield outline
    finally:
        outline.restore()
        put_back(model, before)
        for p, grad in grads:
            p.grad = grad


def put_back(model: nn.Module, state: Params) -> None:
    """Undo what a trial did to the numbers in parameters and buffers."""
    with torch.no_grad():
        for k, v in (*model.named_parameters(), *model.named_buffers()):
            # what has no state of that shape, the forward made, or made anew
            if k in state and state[k].shape == v.shape:
                v.copy_(state[k])


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps tensors autograd made, as old weight_norm and pruning do.

    Raises ConfigError naming what cannot be copied.
    """
    try:
        with _Cutting(), torch.no_grad():  # a ScriptModule's weights would be copied with a graph
            made = copy.deepcopy(model)
    except Exception as e:
        raise ConfigError(
            f"model {type(model).__name__} cannot be copied, and clients train a copy: "
            f"{_stubborn(model)}: {e}; keep such a thing outside of the model, or give it __deepcopy__"
        ) from e
    for old, new in zip(model.parameters(), made.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return made


class _Cutting(TorchFunctionMode):
    """A tensor with a graph behind it is copied without the graph, where torch refuses to copy it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            made = args[1][id(args[0])] = args[0].detach().clone()
            return made
        return func(*args, **(kwargs or {}))


def _stubborn(model: nn.Module) -> str:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            try:
                with _Cutting():
                    copy.deepcopy(value if key not in TORCHS or "hooks" in key else None)
            except Exception:
                return f"{key} of layer {name or 'the model'} ({type(module).__name__})"
    return "a part of it"


def _is_torchs(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module).__module__.startswith("torch.nn.modules.") and not hooks


def _entries(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    computed = _computed(module)
    return {k: (v, None if k in computed else _content(v)) for k, v in vars(module).items()}


def _shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {k: (b.shape, b.dtype) for k, b in module._buffers.items() if b is not None}


def _computed(module: nn.Module) -> set[str]:
    """Weights that old weight_norm, spectral_norm and pruning compute anew before every forward."""
    ends = ("_g", "_v", "_orig")
    return {k.removesuffix(end) for k in module._parameters for end in ends if k.endswith(end)}


def _content(value: Any) -> Any:
    if isinstance(value, (dict, list, set)):
        return copy.copy(value)
    if isinstance(value, Tensor) and not value.is_inference():
        return value._version, value.detach().clone()
    return None


def _as_was(value: Any, content: Any) -> bool:
    """Whether what is in ``value`` is what was found in it."""
    if isinstance(value, dict):
        return value.keys() == content.keys() and all(
            _same(content[k], v) for k, v in value.items()
        )
    if isinstance(value, list):
        return len(value) == len(content) and all(map(_same, content, value))
    if isinstance(value, set):
        return bool(value == content)
    return content is None or value._version == content[0] or torch.equal(value, content[1])


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, list):
        value[:] = content
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(content)
    else:
        with torch.no_grad():
            value.copy_(content[1])


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if isinstance(new, tuple):
        return type(old) is type(new) and len(old) == len(new) and all(map(_same, old, new))
    return isinstance(new, (bool, int, float, str)) and type(old) is type(new) and bool(old == new)
