"""``fedtorch models|datasets|strategies|version``: what there is, one line each."""

import ast
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import fedtorch
from fedtorch.commands.options import only
from fedtorch.named import find
from fedtorch.run import zoo
from fedtorch.run.names import CHOICES


def models(argv: Sequence[str]) -> int:
    """Every file of the model folders and its first line."""
    found = {name: zoo.file(name) for name in zoo.names()}
    return show({name: first_line(path) for name, path in found.items() if path}, argv, "models")


def datasets(argv: Sequence[str]) -> int:
    """Every dataset by its short name."""
    return show(described("dataset"), argv, "datasets")


def strategies(argv: Sequence[str]) -> int:
    """Every strategy by its short name."""
    return show(described("strategy"), argv, "strategies")


def version(argv: Sequence[str]) -> int:
    """The version installed."""
    only(argv, "version")
    print(fedtorch.__version__)
    return 0


def described(choice: str) -> dict[str, str]:
    """Short name -> the first line of the class's docstring."""
    classes = {name: find(path) for name, path in CHOICES[choice].items()}
    return {n: (inspect.getdoc(c) or "").partition("\n")[0] for n, c in classes.items()}


def first_line(path: Path) -> str:
    """First line of a file's docstring, read without running the file."""
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError, OSError) as e:
        return f"cannot be read: {e}"
    return (text or "").partition("\n")[0]


def show(table: Mapping[str, str], argv: Sequence[str], command: str) -> int:
    """Aligned lines, or one JSON object with ``--json``."""
    if "json" in only(argv, command, {"json"}):
        print(json.dumps(table, indent=2))
        return 0
    width = max(map(len, table), default=0)
    for name, text in table.items():
        print(f"{name:<{width}}  {text}".rstrip())
    return 0
