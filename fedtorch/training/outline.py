"""A module apart from its weights: copies of it, and what a forward changes of it, put back.

Layers of PyTorch keep nothing from call to call but in buffers. Others keep a hidden state, a cache or a
counter as an attribute, in a list or an object of such, or make buffers as they run.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedtorch.training.contents import DEEP, as_was, inside, refill, same
from fedtorch.training.module import snapshot
from fedtorch.types import ConfigError, Params

TORCHS = {*vars(nn.Module())}
"""What every module has: parameters, buffers, hooks and the mode."""


class Submodule(NamedTuple):
    """One submodule as it was."""

    name: str
    module: nn.Module
    entries: dict[str, Any]
    """Its attributes."""
    held: list[tuple[str, Any, Any]]
    """By their names, what of them and of what lies in them could change, and what was in it."""
    shapes: dict[str, tuple[torch.Size, torch.dtype]]
    """Of its buffers."""


class Change(NamedTuple):
    """What of a module is not as it was."""

    what: str
    saved: bool
    """It has a place in the model's ``state_dict``."""


class Outline:
    """Attributes, buffers and modes of a module and its submodules, to be compared and put back.

    Of parameters and buffers only which tensors they are, not the numbers in them.
    """

    def __init__(self, model: nn.Module, own: bool = False) -> None:
        """``own``: only of submodules whose code or hooks are not PyTorch's, as the others keep nothing."""
        # which are looked at by themselves, also where a list of them is kept
        seen = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._parts = [
            Submodule(name, module, {**vars(module)}, _held(module, seen), _shapes(module))
            for name, module in model.named_modules()
            if not (own and _is_torchs(module)) and not isinstance(module, torch.jit.ScriptModule)
        ]
        self._modes = [(m, m.training) for m in model.modules()] if not own else []

    def restore(self) -> None:
        """Put everything back as it was."""
        for _, module, entries, held, shapes in self._parts:
            table = vars(module)
            for key in table.keys() - entries.keys():
                del table[key]
            table.update(entries)
            for _, value, before in held:
                if not as_was(value, before):
                    refill(value, before)
            for key, (shape, _) in shapes.items():
                buffer = module.get_buffer(key)
                if buffer.shape != shape:  # made larger in place
                    buffer.resize_(shape)
        for module, training in self._modes:
            module.training = training

    def changed(self) -> Change | None:
        """The first thing that is not as it was, if there is one."""
        for name, module, entries, held, shapes in self._parts:
            where = f"layer {name or 'the model'} ({type(module).__name__})"
            now = _shapes(module)
            for key in {**shapes, **now}:
                if shapes.get(key) != now.get(key):
                    return Change(
                        f"buffer {key} of {where}", key not in module._non_persistent_buffers_set
                    )
            passed = TORCHS | _computed(module)
            for key, value in vars(module).items():
                if not (key in passed or same(entries.get(key, ABSENT), value)):
                    return Change(f"attribute {key} of {where}", False)
            for key, value, before in held:
                if not (key in passed or as_was(value, before)):
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


def _held(module: nn.Module, seen: set[int]) -> list[tuple[str, Any, Any]]:
    """What could change in its attributes; ``seen``: what others have too, as options that all share."""
    computed = _computed(module)
    return [
        (key, value, before)
        for key, attribute in vars(module).items()
        if key not in computed
        # its weights and layers are looked at by themselves
        for value, before in inside((attribute,), seen, 1 if key in TORCHS else DEEP)
    ]


def _shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {k: (b.shape, b.dtype) for k, b in module._buffers.items() if b is not None}


def _computed(module: nn.Module) -> set[str]:
    """Weights that old weight_norm, spectral_norm and pruning compute anew before every forward."""
    ends = ("_g", "_v", "_orig")
    return {k.removesuffix(end) for k in module._parameters for end in ends if k.endswith(end)}
