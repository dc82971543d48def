"""Names that a package offers and imports only once somebody asks for them (PEP 562)."""

import ast
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def offers(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose ``__init__.py`` is ``file``.

    Where a name is from, its ``if TYPE_CHECKING:`` says, for type checkers too. The package's own modules
    are found as well.
    """

    @cache
    def where() -> dict[str, str]:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        block = next(node for node in tree.body if isinstance(node, ast.If)).body
        nodes = [node for node in block if isinstance(node, ast.ImportFrom)]
        return {a.name: str(node.module) for node in nodes for a in node.names}

    def ask(name: str) -> Any:
        if name.startswith("__"):
            found = None
        elif name in where():
            found = getattr(import_module(where()[name]), name)
        elif find_spec(f"{package}.{name}"):
            found = import_module(f"{package}.{name}")
        else:
            found = None
        if found is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)  # asked for once
        return found

    return ask, lambda: sorted({*vars(sys.modules[package]), *where()})


class Renamed(MetaPathFinder, Loader):
    """Finds modules by the names that they had before: the very modules, under both."""

    def __init__(self, now: Mapping[str, str]) -> None:
        self.now = now

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where others do not find it."""
        return ModuleSpec(fullname, self) if fullname in self.now else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in its place."""
        sys.modules[module.__name__] = import_module(self.now[module.__name__])
