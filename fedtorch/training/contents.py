"""What is in lists, tables, arrays and objects that a module keeps, to be compared and put back."""

import copy
import sys
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DEEP = 4
"""How many of them may lie in one another."""

MANY = 256
"""Items up to which those of a list or table are looked into."""

LIBRARIES = {"torch", "numpy", "fedtorch", *sys.stdlib_module_names}
"""Objects of these keep what they keep to themselves."""

STEPPING = "torch.optim."
"""But for optimizers and schedulers, which remember earlier gradients, and so whose they were."""


def content(value: Any) -> Any:
    """A copy of what is in ``value``, one level deep; None where nothing in it could change."""
    if isinstance(value, (dict, list, set, deque)):
        return copy.copy(value)
    if isinstance(value, np.ndarray):
        return value.copy() if value.dtype.kind in "biufc" else None
    if isinstance(value, Tensor):
        return None if value.is_inference() else (value._version, value.detach().clone())
    return dict(vars(value)) if _is_object(value) else None


def inside(value: Any, seen: set[int], deep: int = DEEP) -> Iterator[tuple[Any, Any]]:
    """What in ``value``, and in that, could change, each with its content, but what was ``seen`` (ids)."""
    if deep == 0 or isinstance(value, (Tensor, np.ndarray)):
        return
    parts: Collection[Any] = value if isinstance(value, (list, tuple, deque)) else ()
    parts = value.values() if isinstance(value, dict) else parts
    parts = vars(value).values() if _is_object(value) else parts
    for part in parts if len(parts) <= MANY else ():
        if id(part) in seen:
            continue
        if (found := content(part)) is not None:
            seen.add(id(part))
            yield part, found
        yield from inside(part, seen, deep - 1)


def as_was(value: Any, before: Any) -> bool:
    """Whether what is in ``value`` is what was found in it."""
    if isinstance(value, dict):  # first: a module has a dozen, most of them empty, for every visit
        return _as_were(value, before) if value or before else True
    if isinstance(value, set):
        return bool(value == before)
    if isinstance(value, np.ndarray):
        return bool(np.array_equal(value, before, equal_nan=value.dtype.kind in "fc"))
    if isinstance(value, Tensor):
        return value._version == before[0] or torch.equal(value, before[1])
    if isinstance(value, (list, deque)):
        return len(value) == len(before) and all(map(same, before, value))
    return _as_were(vars(value), before)


def _as_were(table: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return table.keys() == before.keys() and all(same(before[k], v) for k, v in table.items())


def refill(value: Any, before: Any) -> None:
    """Put back what was in it."""
    if isinstance(value, list):
        value[:] = before
    elif isinstance(value, deque):
        value.clear()
        value.extend(before)
    elif isinstance(value, np.ndarray):
        np.copyto(value, before)
    elif isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(before[1])
    else:
        table = value if isinstance(value, (dict, set)) else vars(value)
        table.clear()
        table.update(before)


def same(old: Any, new: Any) -> bool:
    """Whether one is in the place of the other, or as good as it."""
    if old is new:
        return True
    if isinstance(new, tuple):
        return type(old) is type(new) and len(old) == len(new) and all(map(same, old, new))
    return isinstance(new, (bool, int, float, str)) and type(old) is type(new) and bool(old == new)


def _is_object(value: Any) -> bool:
    """Of a class of somebody's own, and neither a layer nor a function."""
    if isinstance(value, (type, nn.Module, Tensor)) or not hasattr(value, "__dict__"):
        return False
    kind = type(value).__module__
    return kind.startswith(STEPPING) or kind.partition(".")[0] not in LIBRARIES
