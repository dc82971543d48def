"""What a tidy house shows, and where this one does not: a mirror, not a fence (``make shape``).

    python tools/shape.py             figures beside their aims, then what is over
    python tools/shape.py draw        draw the layers of the import contract anew in docs/design.md

Aims are for a reader: where a figure is over its aim, docs/design.md says why or somebody mends it.
"""

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from types import FrameType

HERE = Path(__file__).parents[1]
CORE = ("training", "strategies/base", "aggregation/mean", "channel/base", "rounds/synchronous")
CORE += ("engines/base", "engines/local", "engines/solver_choice")
PLANS = ("adaptive", "bands", "base", "client", "clipping", "distributed", "gradients", "local")
PLANS += ("nothing", "one_client", "release", "run", "sample")
CORE += tuple(f"privacy/{name}" for name in PLANS)
VISIT = ("asked", "correction", "evaluate", "local_steps", "local_update", "memory", "passes")
VISIT += ("predict", "results", "sequential", "stacked", "together", "told", "trainee")
VISIT = tuple(f"training/{name}" for name in VISIT)
PROSE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/RESULTS.md")


def sources(top: Path) -> dict[str, str]:
    """Text of each module of the package, by its path without suffix (``training/losses``)."""
    package = top / "fedtorch"
    found = sorted(package.rglob("*.py"))
    return {p.relative_to(package).with_suffix("").as_posix(): p.read_text() for p in found}


def room(module: str) -> str:
    """The folder a module stands in; at the root a module is a room, and a visit is one inside training."""
    return "training (visit)" if module in VISIT else module.split("/")[0]


def core(texts: dict[str, str]) -> list[str]:
    """Modules that one reads to follow a round: the root and what ``CORE`` names."""
    return [m for m in texts if "/" not in m or m in CORE or m.split("/")[0] in CORE]


def long_functions(texts: dict[str, str], limit: int = 40) -> list[str]:
    """``module.function (lines)`` of every function over the limit."""
    over = []
    for module, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                over += [f"{module}.{node.name} ({lines})"] if lines > limit else []
    return over


def shared_names(texts: dict[str, str], limit: int = 2) -> dict[str, list[str]]:
    """Functions, classes and constants that more than so many modules define at their top level."""
    where = defaultdict(set)
    for module, text in texts.items():
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                where[node.name].add(module)
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name) and not target.id.startswith("__"):
                    where[target.id].add(module)
    return {name: sorted(places) for name, places in where.items() if len(places) > limit}


def comments_to_code(texts: dict[str, str]) -> float:
    """Lines with a comment that is not for a tool, by lines of code (neither docstring nor blank)."""
    comments = code = 0
    for text in texts.values():
        prose: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments += not token.string.startswith(("# noqa", "# type:", "# fmt:", "# ruff:"))
            elif token.string.strip() and token.type != tokenize.ENDMARKER:
                lines |= set(range(token.start[0], token.end[0] + 1))
        code += len(lines - prose)
    return comments / max(code, 1)


def long_lines(top: Path, limit: int = 120) -> list[str]:
    """``file:line`` of prose that is wider than a page; tables and pictures cannot be broken."""
    over = []
    for path in sorted(p for pattern in PROSE for p in top.glob(pattern)):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if len(line) > limit and not line.lstrip().startswith(("|", "![")):
                over.append(f"{path.relative_to(top)}:{number} ({len(line)})")
    return over


def imports(texts: dict[str, str]) -> dict[str, set[str]]:
    """For each module the modules of the package that it imports, inside functions too."""
    found: dict[str, set[str]] = {m: set() for m in texts}
    for module, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{a.name}" for a in node.names] + [node.module]
            for name in names:
                path = name.removeprefix("fedtorch").lstrip(".").replace(".", "/")
                hit = next((m for m in (path, f"{path}/__init__") if m in texts), None)
                if name.split(".")[0] == "fedtorch" and hit and hit != module:
                    found[module].add(hit)
    return found


def rooms(texts: dict[str, str]) -> dict[str, set[str]]:
    """For each room the rooms it imports. The root's ``__init__`` offers what it likes."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, others in imports(texts).items():
        if module not in ("__init__", "__main__"):
            found[room(module)] |= {room(m) for m in others} - {room(module), "__init__"}
    return dict(found)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of rooms each of which reaches every other."""

    def reach(start: str) -> frozenset[str]:
        seen, todo = set(), list(graph[start])
        while todo:
            if (here := todo.pop()) not in seen:
                seen.add(here)
                todo += graph.get(here, ())
        return frozenset(seen)

    reached = {r: reach(r) for r in graph}
    groups = {frozenset(o for o in graph if o in reached[r] and r in reached[o]) for r in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def concrete(texts: dict[str, str], where: str, base: str) -> set[str]:
    """Classes in a room that derive from its base class, directly or not."""
    classes = [
        node
        for module, text in texts.items()
        if room(module) == where
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
    ]
    found = {base}
    for _ in classes:
        for node in classes:
            if found & {b.id for b in node.bases if isinstance(b, ast.Name)}:
                found.add(node.name)
    return found - {base}


def naming(texts: dict[str, str], names: set[str], but: tuple[str, ...]) -> set[str]:
    """Modules, but those named, whose code has one of the names in it; prose may."""
    found = set()
    for module, text in texts.items():
        if module in but or room(module) in but:
            continue
        for node in ast.walk(ast.parse(text)):
            if {
                getattr(node, "id", ""),
                getattr(node, "attr", ""),
                getattr(node, "name", ""),
            } & names:
                found.add(module)
    return found


def walked(run: Callable[[], object], package: Path) -> tuple[set[str], int]:
    """Files of the package whose code ran, and how often a call came from another file's code."""
    path: list[str] = []

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{package}/"):
            path.append(frame.f_code.co_filename)

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return set(path), len([file for file, _ in groupby(path)]) - 1


def a_round(solver: str, private: bool) -> tuple[set[str], int]:
    """``walked`` of the second round of four clients, one step each, with two dense layers."""
    import torch
    from torch import nn

    import fedtorch
    from fedtorch import Client, Local, Recipe, Server
    from fedtorch.privacy import SampleLevel

    x, y = torch.randn(160, 12), torch.randint(0, 3, (160,))
    clients = [Client(f"c{k}", (x[k::4], y[k::4])) for k in range(4)]
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    plan = SampleLevel(epsilon=8.0, rounds=4, steps=1, sample_rate=0.2, batch_size=8)
    recipe = Recipe(privacy=plan) if private else Recipe(steps=1)
    server = Server(model, clients, recipe, engine=Local(solver=solver))
    server.round()
    return walked(server.round, Path(fedtorch.__file__).parent)


def layers(top: Path) -> list[str]:
    """The layers of the import contract, the highest first."""
    contracts = tomllib.loads((top / "pyproject.toml").read_text())["tool"]["importlinter"]
    return next(c["layers"] for c in contracts["contracts"] if c["name"] == "layers")


def figure(top: Path) -> str:
    """The layers of the import contract, one a line: it may import what stands below it, never above."""
    bare = [re.sub(r"fedtorch\.|[()]", "", layer) for layer in layers(top)]
    return "\n".join(["```text", *bare, "torch", "```"])


def drawn(top: Path) -> str:
    """docs/design.md with the figure as the contract has it."""
    text = (top / "docs" / "design.md").read_text()
    return re.sub(r"```text\n__main__\n.*?```", figure(top), text, flags=re.DOTALL)


def report(top: Path) -> Iterator[str]:
    """The mirror, line by line: figure, aim; then what is over an aim; then the rooms."""
    texts = sources(top)
    inside, root = core(texts), [m for m in texts if "/" not in m]
    length = {m: text.count("\n") for m, text in texts.items()}
    large = [f"{m} ({n})" for m, n in length.items() if n > 250]
    shared = [f"{n}: {', '.join(where)}" for n, where in shared_names(texts).items()]
    graph = rooms(texts)
    circles = [" <-> ".join(c) for c in cycles(graph)]
    long, wide = long_functions(texts), long_lines(top)
    (general, moves), (fast, _), (private, _) = (
        a_round(*how) for how in (("general", False), ("fast", False), ("auto", True))
    )
    rows: list[tuple[str, float, float, list[str]]] = [
        ("modules at the root", len(root), 8, root),
        ("core, files", len(inside), 45, []),
        ("core, lines", sum(length[m] for m in inside), 4500, []),
        ("package, files", len(texts), 130, []),
        ("package, lines", sum(length.values()), 16500, []),
        ("files over 250 lines", len(large), 0, large),
        ("functions over 40 lines", len(long), 0, long),
        ("names that more than two modules define", len(shared), 0, shared),
        ("comments to code", round(comments_to_code(texts), 3), 0.05, []),
        ("lines of prose over 120", len(wide), 0, wide),
        ("files run in a round, general path", len(general), 17, []),
        ("files run in a round, fast path", len(fast), 21, []),
        ("files run in a round, private default", len(private), 34, []),
        ("changes of file, general, four clients", moves, 110, []),
        ("cycles between rooms", len(circles), 0, circles),
    ]
    for what, found, aim, _ in rows:
        yield f"{what:42}{found:>8}   aim {aim}"
    for what, found, aim, over in rows:
        yield from [f"\n{what}:", *(f"  {line}" for line in over)] if found > aim and over else []
    yield "\nrooms, and the rooms each imports:"
    yield from (f"  {r}: {', '.join(sorted(graph[r])) or 'none'}" for r in sorted(graph))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    if sys.argv[1:] == ["draw"]:
        (HERE / "docs" / "design.md").write_text(drawn(HERE))
    else:
        print("\n".join(report(HERE)))
