"""Single changes to the package: where they can be made, what they make of a file, of a function."""

import ast
import copy
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {
    "privacy": ["fedtorch/privacy/*.py", "fedtorch/privacy/*/*.py"],
    "core": [
        f"fedtorch/{room}*.py"
        for room in ("", "strategies/", "training/", "aggregation/", "rounds/", "checks/", "run/")
    ],
    "sites": ["fedtorch/sites/*.py", "fedtorch/engines/messages.py", "fedtorch/engines/wire.py"],
    "data": ["fedtorch/data/*.py"],
}
LOOKS = {"history", "names", "cli", "console", "results", "sweep", "run/messages"}
"""Modules of the core that only show something: not changed."""

OTHER: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq},
    **{
        ast.NotEq: ast.Eq,
        ast.In: ast.NotIn,
        ast.NotIn: ast.In,
        ast.Is: ast.IsNot,
        ast.IsNot: ast.Is,
    },
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.LShift: ast.RShift, ast.BitAnd: ast.BitOr},
    **{ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And},
}
FLIPPED: dict[type, type] = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def code(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but annotations, docstrings, messages and what is said of a class from outside."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            said = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if (
                not isinstance(child, ast.AST)
                or said
                or isinstance(child, (ast.Raise, ast.JoinedStr))
            ):
                continue
            yield child
            yield from code(child)


Change = tuple[str, Callable[[Any], Any]]
"""A word for it, and what does it to a node."""


def changes(node: ast.AST) -> list[Change]:
    """What can be done to one node."""
    return [*_operators(node), *_conditions(node), *_values(node)]


def _operators(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for table in (OTHER, FLIPPED):
            if new := table.get(type(node.ops[0])):
                yield "compare", lambda n, new=new: setattr(n, "ops", [new()])
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and (
        new := OTHER.get(type(node.op))
    ):
        yield "operator", lambda n, new=new: setattr(n, "op", new())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", lambda n: setattr(n, "op", ast.UAdd())


def _conditions(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield "not", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield "name", lambda n: setattr(n, "id", NAMES[n.id])
    if isinstance(node, ast.Return) and not (node.value is None or _none(node.value)):
        yield "return", lambda n: setattr(n, "value", ast.Constant(None))


def _values(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "constant", lambda n: setattr(n, "value", n.value + 1)
        yield "constant", lambda n: setattr(n, "value", n.value - 1)
    if isinstance(node, ast.Call):
        for k, word in enumerate(node.keywords):
            if word.arg:
                yield "keyword", lambda n, k=k: n.keywords.pop(k)


def _none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def group_of(file: str) -> str:
    """The group a file is in."""
    return next(g for g, patterns in GROUPS.items() if any(Path(file).match(p) for p in patterns))


class Mutant(NamedTuple):
    """File, line, place of the node in the tree, and which of its changes."""

    file: str
    line: int
    place: int
    k: int


def mutants(groups: list[str]) -> list[Mutant]:
    """All of some groups."""
    found = []
    paths = sorted({p for g in groups for pattern in GROUPS[g] for p in ROOT.glob(pattern)})
    for path in paths:
        if {path.stem, f"{path.parent.name}/{path.stem}"} & {*LOOKS, "__init__"}:
            continue
        for place, node in enumerate(code(ast.parse(path.read_text()))):
            line, file = getattr(node, "lineno", 0), str(path.relative_to(ROOT))
            found += [Mutant(file, line, place, k) for k in range(len(changes(node)))]
    return found


def mutate(source: str, place: int, k: int) -> tuple[ast.Module, str, str]:
    """The changed file, and the statement before and after."""
    tree = ast.parse(source)
    node = [*code(tree)][place]
    old = copy.deepcopy(node)
    changes(node)[k][1](node)
    short = [" ".join(ast.unparse(n).split())[:160] for n in (old, node)]
    return ast.fix_missing_locations(tree), short[0], short[1]


Bodies = dict[tuple[str, int], CodeType]
"""By name and first line, what a function runs."""


def bodies(source: str, changed: ast.Module, path: str) -> Bodies | None:
    """The functions that a change alters; None where it alters what runs as the file is imported."""
    old, new = ([*_codes(compile(s, path, "exec", dont_inherit=True))] for s in (source, changed))
    if len(old) != len(new) or len({_key(c) for c in new}) != len(new):
        return None
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if _own(a) != _own(b)]
    if any(not b.co_flags & CO_OPTIMIZED or _key(a) != _key(b) for a, b in pairs):
        return None
    within = {_key(b) for _, b in pairs}
    outer = [c for c in new if within & {_key(i) for i in _codes(c)} and c.co_flags & CO_OPTIMIZED]
    return {_key(c): c for c in outer}


def functions(within: Path) -> dict[str, list[FunctionType]]:
    """All functions in this process whose files lie within a folder, by file."""
    found: dict[str, list[FunctionType]] = defaultdict(list)
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__code__.co_filename.startswith(str(within)):
            found[each.__code__.co_filename].append(each)
    return found


def swap(found: list[FunctionType], new: Bodies) -> None:
    """Let these functions run what was changed."""
    for each in found:
        each.__code__ = new.get(_key(each.__code__), each.__code__)


def _codes(of: CodeType) -> Iterator[CodeType]:
    yield of
    for inner in of.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _key(of: CodeType) -> tuple[str, int]:
    return of.co_qualname, of.co_firstlineno


def _own(of: CodeType) -> tuple[object, ...]:
    """What it runs, without the functions within it."""
    consts = [c for c in of.co_consts if not isinstance(c, CodeType)]
    return of.co_code, of.co_names, of.co_varnames, of.co_freevars, of.co_cellvars, repr(consts)
