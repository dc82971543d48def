"""What a part of a user's own is called, with what it was made of: two that differ have two names."""

import dis
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LONGEST = 200
"""Characters of a name; a longer one ends in its digest."""

LARGEST = 1 << 20
"""Numbers of a tensor that are looked at; of a larger one its shape alone is told."""

LONG = 10_000
"""Items of a list or table that are looked at."""

OURS = ("torch.", "fedtorch.")
"""Packages whose functions are known by their names alone."""

LAMBDA = "<lambda>"

SETS = (set, frozenset)


def called(part: Any) -> str:
    """The name of a class or function, and in brackets what it was given.

    Arguments of a ``functools.partial``; defaults and values around a function; of an object what its
    constructor takes and it keeps by that name. A lambda has its code's digest for a name.
    """
    return short(part if isinstance(part, str) else _called(part, ()))


def worded(value: Any) -> str:
    """A value in an option, in words that differ from another's."""
    return short(_value(value, ()))


def lax(name: Any) -> Any:
    """The same where digests of code tell nothing, as in another release of Python."""
    return re.sub(rf"{LAMBDA} [0-9a-f]+", LAMBDA, name) if isinstance(name, str) else name


def short(text: str) -> str:
    """Text of at most ``LONGEST`` characters, different for different texts."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}... {_digest(text.encode())}"


def _called(part: Any, around: tuple[int, ...]) -> str:
    if id(part) in around:  # it holds itself
        return type(part).__name__
    value = partial(_value, around=(*around, id(part)))
    if isinstance(part, partial):
        return _with(
            _called(part.func, (*around, id(part))), value, part.args, part.keywords.items()
        )
    if isinstance(part, MethodType):
        return f"{_called(part.__self__, around)}.{part.__name__}"
    if isinstance(inner := _compiled(part), FunctionType | nn.Module):
        return _called(inner, (*around, id(part)))
    if isinstance(part, FunctionType):
        name = part.__name__
        name = f"{name} {_digest(_code(part.__code__))}" if name == LAMBDA else name
        return _with(name, value, (), _held(part))
    if isinstance(part, type) or hasattr(part, "__name__"):
        return str(part.__name__)
    return _with(type(part).__name__, value, (), _options(part))


def _compiled(part: Any) -> Any:
    """What torch.compile was given for it, or another decorator of torch; None: nothing of theirs."""
    where = part.__globals__.get("__name__") if isinstance(part, FunctionType) else ""
    return getattr(part, "__wrapped__" if f"{where}.".startswith(OURS) else "_orig_mod", None)


def _with(
    name: str, value: Callable[[Any], str], args: Iterable[Any], named: Iterable[tuple[str, Any]]
) -> str:
    words = [value(a) for a in args] + [f"{k}={value(v)}" for k, v in named]
    return f"{name}({', '.join(words)})" if words else name


def _value(value: Any, around: tuple[int, ...]) -> str:
    again = partial(_value, around=around)
    if isinstance(value, (Mapping, list, tuple, *SETS)) and len(value) > LONG:  # data, not options
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, (np.ndarray, Tensor)):
        return _contents(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{again(k)}: {again(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(again, value)) + "]"
    if isinstance(value, SETS):  # its order is another in each process
        return "{" + ", ".join(sorted(map(again, value))) + "}"
    kept = getattr(value, "__dict__", {})
    if not callable(value) and any(isinstance(v, SETS) for v in kept.values()):
        return _with(type(value).__name__, again, (), kept.items())
    words = repr(value)
    # where it lies in memory is no part of what it is
    if callable(value) or " at 0x" in words:
        return _called(value, around)
    return short(words)


def _contents(array: Any) -> str:
    """Shape and digest of the numbers of a tensor or array."""
    words = f"{type(array).__name__}{[*array.shape]}"
    moves = isinstance(array, nn.Parameter)  # it is trained, and another in each round
    if moves or array.dtype == object or 0 in array.shape or np.prod(array.shape) > LARGEST:
        return words
    if isinstance(array, Tensor):
        if array.layout != torch.strided or array.is_meta:
            return words
        plain = array.detach().cpu().resolve_conj().resolve_neg().contiguous()
        array = plain.reshape(-1).view(torch.uint8).numpy()
    return f"{words} {_digest(np.ascontiguousarray(array).tobytes())}"


def _held(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Defaults of a function's arguments, and values around it, but for those that it changes itself."""
    if f"{function.__module__}.".startswith(OURS):
        return
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(names[len(names) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    changed = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_DEREF"}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # it has none yet
            continue
        fixed = isinstance(value, (bool, int, float, str, type(None), tuple)) or callable(value)
        if fixed and name not in changed:
            yield name, value


def _options(part: Any) -> Iterator[tuple[str, Any]]:
    """What the constructor of an object's class takes, where it is kept by the same name."""
    try:
        takes = inspect.signature(type(part)).parameters
    except (ValueError, TypeError):
        return
    kept = dict(getattr(part, "__dict__", {}))
    for group in ("_buffers", "_parameters", "_modules"):
        kept |= kept.get(group) or {}
    for name, parameter in takes.items():
        value = kept.get(name)
        if value is not None and value is not parameter.default:
            yield name, value


def _code(code: CodeType) -> bytes:
    """What a function does, wherever it is written."""
    consts = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in code.co_consts]
    inner = [_code(c) if isinstance(c, CodeType) else repr(c).encode() for c in consts]
    return b"\0".join((code.co_code, repr(code.co_names).encode(), *inner))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]
