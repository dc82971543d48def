"""Loops over arrays as machine code, where numba is installed (``pip install 'fedtorch[fast]'``).

A loop is compiled on its first call for the types it is called with, which takes about half a second, and
kept in the user's cache folder. Sums may be regrouped, as in any vector code, unless it is to be ``exact``.
NaN and infinity are what they were.
"""

import logging
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

from fedtorch.process import Unsearched

Loop = TypeVar("Loop", bound=Callable[..., Any])

HERE = Path(__file__)

COMPILING = "loops are compiled for this processor, which takes ten seconds or so, once"

LOG = logging.getLogger("fedtorch.kernels")
"""Says so, before it is waited for."""

FASTER = "pip install 'fedtorch[fast]' would make it faster"
"""What to tell whoever has no numba."""


def available() -> bool:
    """Whether numba can be imported and compiles: ``NUMBA_DISABLE_JIT`` is not set.

    Installed beside a NumPy that is too new it cannot. The first to ask waits half a second.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return False
    if "numba" in sys.modules:
        return sys.modules["numba"] is not None
    try:
        with Unsearched():
            from numba.core.registry import cpu_target

            # of its modules half are read only now, and else would be at the first call
            cpu_target.typing_context.refresh()
            cpu_target.target_context.refresh()
    except ImportError:
        return False
    return True


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
    from numba.core import config

    telling()
    fast = {"contract"} if exact else {"contract", "reassoc"}
    options = {"nogil": True, "error_model": "numpy", "fastmath": fast}
    named = cast(FunctionType, loop)
    named.__qualname__ = f"{named.__qualname__.partition('-')[0]}-{digest_of(named, exact)}"
    before = config.CACHE_DIR
    try:
        config.CACHE_DIR = before or str(folder())
        return cast(Loop, njit(loop, cache=True, **options))
    except RuntimeError:  # nowhere to keep it: compiled anew in each process
        return cast(Loop, njit(loop, **options))
    finally:
        config.CACHE_DIR = before


def folder() -> Path:
    """Where loops are kept, unless ``NUMBA_CACHE_DIR`` says where."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedtorch" / "loops"


@cache
def telling() -> None:
    """From now on the first loop of ours that has to be compiled is told."""
    from numba.core import event

    class Told(event.Listener):  # type: ignore[misc]
        told = False

        def on_start(self, event: Any) -> None:
            module = str(event.data["dispatcher"].py_func.__module__)
            ours = module.startswith("fedtorch.")
            if ours and not self.told:
                self.told = True
                where = os.environ.get("NUMBA_CACHE_DIR") or folder()
                LOG.info("%s: they are kept in %s", COMPILING, where)

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", Told())


def digest_of(loop: FunctionType, exact: bool) -> str:
    """Of all that decides what a loop becomes, to be part of the name by which it is kept.

    numba looks at the loop's own file alone, and keeps the new version under the old one's name: a process
    killed while it writes leaves the old one there for good, and that may be of noise.
    """
    own = Path(loop.__code__.co_filename)
    text = own.read_bytes() if own.is_file() else b""
    found = b"".join(_text(p) for p in sorted(used(text))) + text + bytes([exact])
    return sha256(found).hexdigest()[:12]


def used(text: bytes) -> set[Path]:
    """This file, and those beside it that a loop's file imports from, and they: they end up in its code."""
    found, new = set[Path](), {HERE} | _imported(text)
    while new:
        file = new.pop()
        found.add(file)
        new |= _imported(_text(file)) - found
    return found


@cache
def _imported(text: bytes) -> set[Path]:
    names = re.findall(rb"^from fedtorch\.kernels\.(\w+) import", text, re.M)
    return {HERE.with_name(f"{name.decode()}.py") for name in names}


@cache
def _text(file: Path) -> bytes:
    return file.read_bytes()
