"""Whether a loss keeps something from call to call: it would go from client to client.

A module keeps it in a buffer or an attribute, a function in a cell, a default, an attribute or a name
outside.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.recipe import Recipe
from fedtorch.training.module import snapshot
from fedtorch.training.outline import Outline, untouched
from fedtorch.tree import same
from fedtorch.types import ConfigError

BETWEEN = 3
"""Other batches between two times that a batch must have the same loss."""

DATA = (
    bool,
    int,
    float,
    complex,
    str,
    Tensor,
    np.ndarray,
    dict,
    list,
    tuple,
    set,
    deque,
    type(None),
)
"""What is compared by what is in it."""


def nothing(word: str, loss: Any, ask: Callable[[Any], Tensor], given: Any, other: Any) -> None:
    """Raises ConfigError naming what a loss, or a step, keeps; what it makes once, at first, is no matter.

    ``ask`` asks it for the losses of ``given``, and of something ``other``. What is drawn is the same at
    each call here. Modules are left as they were; of a function that keeps something, what it kept is left.
    """
    with ExitStack() as stack:
        first = [v for _, v in _inside(loss) if isinstance(v, nn.Module)]
        for module in first:
            stack.enter_context(untouched(module))
        own = _value(ask, given)
        outlines, before = [(Outline(m), m, snapshot(m)) for m in first], _held(loss)
        _value(ask, given)
        what = next(_moved(outlines), None) or _changed(before, _held(loss))
        if not what and not _repeats(ask, own, given, other):
            what = "the same batch has another loss after others"
    if what:
        raise ConfigError(
            f"the {word} keeps something from call to call ({what}), which would go from client to client: "
            "let the model keep it (in a buffer, and return it beside the output), compute it from each "
            "batch alone or, if it is only to be looked at, let a metric or an observer of Server do that"
        )


@contextmanager
def from_no_batch(recipe: Recipe) -> Iterator[None]:
    """Around all trials of a recipe with privacy by example: what they leave in it is of somebody's rows.

    Raises ConfigError naming what the loss, or the step, has kept, be it made once, at first.
    """
    word, asked = ("loss", recipe.loss) if recipe.step is None else ("step", recipe.step)
    private = recipe.privacy.per_example is not None
    before = _held(asked) if private else {}
    yield
    if private and (what := _changed(before, _held(asked))):
        raise ConfigError(
            f"the {word} keeps something of what it is first given ({what}), and sample-level privacy "
            "covers no row that later batches meet so: make it from each batch alone, or before the "
            f"{word} is handed over"
        )


def _moved(outlines: list[tuple[Outline, nn.Module, Any]]) -> Iterator[str]:
    for outline, module, old in outlines:
        if change := outline.changed():
            yield change.what
        else:
            now = snapshot(module)
            yield from (k for k in old if not bool(same(now[k], old[k]).all()))


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    return next((k for k in now if k not in before or not _equal(before[k], now[k])), None)


def _repeats(ask: Callable[[Any], Tensor], own: Tensor, given: Any, other: Any) -> bool:
    """Whether a batch has the loss that it had before some of another kind."""
    try:
        for _ in range(BETWEEN):
            _value(ask, other)
    except Exception:  # half of an output may be none
        return True
    again = _value(ask, given)
    return torch.allclose(own, again, rtol=1e-5, atol=1e-7, equal_nan=True)


def _value(ask: Callable[[Any], Tensor], given: Any) -> Tensor:
    with seeds.seeded(0):
        return ask(given).detach().clone()


def _held(loss: Any) -> dict[str, Any]:
    return {name: _content(v) for name, v in _inside(loss) if isinstance(v, DATA)}


def _inside(loss: Any) -> Iterator[tuple[str, Any]]:
    """What a loss has of its own, by name, and what the functions and objects that it calls have."""
    todo, seen = [("", loss)], {id(None)}
    while todo:
        where, value = todo.pop(0)
        if isinstance(value, (*DATA, nn.Module)):
            yield where, value
            continue
        if id(value) in seen or isinstance(value, type) or _foreign(value):
            continue
        seen.add(id(value))
        todo += [(f"{where}.{k}" if where else k, v) for k, v in held_by(value)]


def _foreign(value: Any) -> bool:
    """Of torch, Python or this package, which keep nothing; or nothing that is called."""
    home = str(getattr(value, "__module__", "builtins")).partition(".")[0]
    ours = isinstance(value, (functools.partial, MethodType))
    return not callable(value) or (not ours and home in ("torch", "fedtorch", "builtins", "numpy"))


def held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """What a function, a method, a partial or an object that is called holds, by name."""
    if isinstance(value, functools.partial):
        yield "partial", value.func
        yield from ((f"argument {k}", v) for k, v in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, MethodType):
        yield "method", value.__func__
        yield type(value.__self__).__name__, value.__self__
    elif isinstance(value, FunctionType):
        code = value.__code__
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # a cell that is empty as yet
                yield name, cell.cell_contents
        yield from ((f"default {k}", v) for k, v in enumerate(value.__defaults__ or ()))
        yield from (value.__kwdefaults__ or {}).items()
        yield from ((k, value.__globals__[k]) for k in code.co_names if k in value.__globals__)
    else:
        yield "call", type(value).__call__
    yield from getattr(value, "__dict__", {}).items()


def _content(value: Any, deep: bool = True) -> Any:
    """A copy of what is in it, one level deep."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if deep and isinstance(value, dict):
        return {k: _content(v, False) for k, v in value.items()}
    if deep and isinstance(value, (list, tuple, deque)):
        return [_content(v, False) for v in value]
    return set(value) if deep and isinstance(value, set) else value


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and bool(same(old, new).all())
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        return bool(np.array_equal(old, new, equal_nan=old.dtype.kind in "fc"))
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_equal(v, new[k]) for k, v in old.items())
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_equal, old, new))
    simple = isinstance(new, (bool, int, float, complex, str, set))
    return old is new or (simple and type(old) is type(new) and bool(old == new or old != old))
