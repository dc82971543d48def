"""What a dotted name stands for: an import, and the one sentence about an import that fails."""

import importlib
import sys
from types import ModuleType
from typing import Any

from fedtorch.types import ConfigError


def find(path: str) -> Any:
    """``package.module:name`` or ``package.module.name`` -> the object; raises ConfigError."""
    where, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    found = module(where, path)
    try:
        return getattr(found, name)
    except Exception as e:  # a module may look its names up by code of its own
        raise ConfigError(f"cannot import {path!r}: {e}") from e


def module(name: str, path: str = "") -> ModuleType:
    """A module by its name; one of the working folder too. ``path``: what was asked for."""
    if name.partition(".")[0] != "fedtorch":
        from_here()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as e:  # a user's module can fail in any way while it is imported
        raise ConfigError(f"cannot import {path or name!r}: {type(e).__name__}: {e}") from e


def from_here() -> None:
    """Find modules of the working folder too, after all others, as code of the user's own expects.

    Only once such code is asked for: until then a file that lies there, whoever put it there, is never
    taken for a package that is not installed.
    """
    if "" not in sys.path:
        sys.path.append("")
