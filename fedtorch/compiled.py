"""Loops over arrays as machine code, where numba is installed (``pip install 'fedtorch[fast]'``).

A loop is compiled on its first call for the types it is called with, which takes about half a second, and
kept on disk. Sums may be regrouped, as in any vector code, unless it is to be ``exact``, which must be the
same wherever a loop is asked for: the disk keeps one. NaN and infinity are what they were.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar, cast

Loop = TypeVar("Loop", bound=Callable[..., Any])


FASTER = "pip install 'fedtorch[fast]' would make it faster"
"""What to tell whoever has no numba."""


def available() -> bool:
    """Whether numba is installed; it is imported where a loop is first asked for, in half a second."""
    return find_spec("numba") is not None


@cache
def loops(module: str) -> Any:
    """A module of compiled loops, or None without numba: whoever asks then does the same in another way."""
    return import_module(module) if available() else None


@cache
def compiled(loop: Loop, exact: bool = False) -> Loop | None:
    """A single loop as machine code, or None without numba."""
    return machine_code(loop, exact) if available() else None


def machine_code(loop: Loop, exact: bool = False) -> Loop:
    """A loop as machine code; raises ImportError without numba."""
    from numba import njit

    fast = {"contract"} if exact else {"contract", "reassoc"}
    options = {"nogil": True, "error_model": "numpy", "fastmath": fast}
    try:
        return cast(Loop, njit(loop, cache=True, **options))
    except RuntimeError:  # nowhere to keep it: compiled anew in each process
        return cast(Loop, njit(loop, **options))
