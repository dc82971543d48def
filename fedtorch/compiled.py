"""Loops over arrays as machine code, where numba is installed (``pip install 'fedtorch[fast]'``)."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

Loop = TypeVar("Loop", bound=Callable[..., Any])


@cache
def compiled(loop: Loop, exact: bool = False) -> Loop | None:
    """The loop as machine code, or None without numba: whoever asks then does the same in another way.

    It is compiled on its first call for the types it is called with, which takes about half a second, and
    kept on disk. Sums may be regrouped, as in any vector code, unless the loop is to be ``exact``; NaN and
    infinity are what they were.
    """
    try:
        from numba import njit
    except ImportError:
        return None
    fast = {"contract"} if exact else {"contract", "reassoc"}
    options = {"nogil": True, "error_model": "numpy", "fastmath": fast}
    try:
        return cast(Loop, njit(loop, cache=True, **options))
    except RuntimeError:  # nowhere to keep it: compiled anew in each process
        return cast(Loop, njit(loop, **options))
