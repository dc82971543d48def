"""Do the tests bite? One small change at a time in the package, and the tests that run the changed line.

    python tools/mutate.py map --tests tests/test_privacy_*.py      which test runs which line, and how long
    python tools/mutate.py run --seed 1 --count 300 privacy core    try so many changes, a process each
    python tools/mutate.py show                                     what came of them

All happens in a copy of the working tree under build/mutants, so that processes which tests start see the
change too. A run goes on where it was stopped. Changes that change nothing are named, with the reason, in
tools/equivalent.toml.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "mutants"
COPY, MAP, RESULTS = PLACE / "copy", PLACE / "map.json", PLACE / "results.json"
GROUPS = {
    "privacy": ["fedtorch/privacy/*.py", "fedtorch/privacy/*/*.py"],
    "core": [
        f"fedtorch/{room}*.py"
        for room in ("", "strategies/", "training/", "aggregation/", "rounds/", "checks/", "run/")
    ],
    "sites": ["fedtorch/sites/*.py", "fedtorch/engines/messages.py", "fedtorch/engines/wire.py"],
    "data": ["fedtorch/data/*.py"],
}
LOOKS = {
    "cli",
    "choices",
    "console",
    "figures",
    "history",
    "narrate",
    "saved",
    "sweep",
    "lanes",
    "tile",
}
"""Modules of the core that only show something, or write machine code: not changed."""

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


def mutants(groups: list[str]) -> list[tuple[str, int, int, int]]:
    """File, line, place of the node in the tree, and which of its changes."""
    found = []
    paths = sorted({p for g in groups for pattern in GROUPS[g] for p in ROOT.glob(pattern)})
    for path in (p for p in paths if p.stem not in LOOKS and p.stem != "__init__"):
        for place, node in enumerate(code(ast.parse(path.read_text()))):
            line = getattr(node, "lineno", 0)
            name = str(path.relative_to(ROOT))
            found += [(name, line, place, k) for k in range(len(changes(node)))]
    return found


def mutate(source: str, place: int, k: int) -> tuple[str, str, str]:
    """The changed source, and the statement before and after."""
    tree = ast.parse(source)
    node = [*code(tree)][place]
    old = copy.deepcopy(node)
    changes(node)[k][1](node)
    short = [" ".join(ast.unparse(n).split())[:160] for n in (old, node)]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n", short[0], short[1]


class Tracer:
    """A pytest plugin: lines of the package that each test runs in this process, and its seconds."""

    def __init__(self) -> None:
        self.lines: dict[str, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.now: set[str] = set()
        self.within = str(COPY / "fedtorch") + os.sep

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        """Follow what is in the package."""
        name = frame.f_code.co_filename
        if not name.startswith(self.within):
            return None
        name = name[len(str(COPY)) + 1 :]
        self.now.add(f"{name}:{frame.f_lineno}")

        def lines(frame: Any, event: str, arg: Any) -> Any:
            self.now.add(f"{name}:{frame.f_lineno}")
            return lines

        return lines

    def pytest_runtest_protocol(self, item: Any) -> None:
        """A test begins."""
        self.now = set()
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A part of it has ended: setting up, the test itself, or tidying up."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        self.failed |= {report.nodeid} if report.failed else set()
        if report.when == "teardown":
            sys.settrace(None)
            for line in self.now:
                self.lines[line].add(report.nodeid)


def fresh() -> None:
    """A copy of the working tree, without what git ignores."""
    shutil.rmtree(COPY, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(
        listed, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split():
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, COPY / name)


def enter() -> None:
    """Work in the copy, and let every process that is started from here do so."""
    os.chdir(COPY)
    sys.path[:] = [
        str(COPY),
        *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tools")),
    ]
    os.environ |= {"PYTHONPATH": str(COPY), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True


def draw_map(tests: list[str]) -> None:
    """Run the tests once and note what each runs; files mapped before are kept."""
    fresh()
    enter()
    import pytest

    saved = json.loads(MAP.read_text()) if MAP.exists() else {"lines": {}, "seconds": {}}
    for file in tests:
        tracer = Tracer()
        pytest.main(["-q", "-p", "no:cacheprovider", file], plugins=[tracer])
        saved["seconds"] |= tracer.seconds
        for line, names in tracer.lines.items():
            kept = {*saved["lines"].get(line, []), *names} - tracer.failed
            saved["lines"][line] = sorted(kept)
        MAP.write_text(json.dumps(saved))


WORDS = {0: "survived", 3: "broken", 4: "broken", 5: "broken"}
"""What pytest's exit says: 1 a test failed, 2 none could be collected, the others are no fault of ours."""


def attempt(tests: list[str], limit: float) -> str:
    """In a process of its own: do these tests, quickest first, notice?"""
    child = os.fork()
    if not child:
        os.setsid()
        quiet = os.open(PLACE / "last.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        import pytest

        os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if (done := os.waitpid(child, os.WNOHANG))[0]:
            return WORDS.get(os.waitstatus_to_exitcode(done[1]), "killed")
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def run(seed: int, count: int, groups: list[str], minutes: float, most: int) -> None:
    """Try ``count`` changes drawn by ``seed``; results are kept after each.

    Each is tried against ``most`` tests, the quickest of those that run its line. Started again with more,
    or with a wider map, it tries those again that nobody noticed.
    """
    known = json.loads(MAP.read_text())
    drawn = random.Random(seed).sample(all_ := mutants(groups), min(count, len(all_)))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    equal, whole = equivalents(), defaultdict(set)
    for line, names in known["lines"].items():
        whole[line.partition(":")[0]] |= {*names}
    fresh()
    enter()
    for name in ("torch", "pytest", "numpy", "scipy.special", "opacus", "numba", "sklearn"):
        __import__(name)
    end = time.monotonic() + 60 * minutes
    for number, (file, line, place, k) in enumerate(drawn, 1):
        source = (ROOT / file).read_text()
        changed, old, new = mutate(source, place, k)
        name = f"{file}: {source.splitlines()[line - 1].strip()} | {old} -> {new}"
        key = f"{seed} {place}.{k} {line} {name}"
        # lines of compiled loops run unseen: by whatever runs others of their file
        tests = known["lines"].get(f"{file}:{line}") or whole[file]
        tests = sorted(tests, key=lambda t: known["seconds"][t])[:most]
        before = results.get(key, {"outcome": "untested", "tests": 0})
        open_ = before["outcome"] in ("survived", "untested", "broken") and before["tests"] < len(
            tests
        )
        if (before["outcome"] != "untested" and not open_) or time.monotonic() > end:
            continue
        outcome, began = "untested", time.monotonic()
        if name in equal:
            outcome = "equivalent"
        elif tests:
            (COPY / file).write_text(changed)
            outcome = attempt(tests, 60 + 5 * sum(known["seconds"][t] for t in tests))
            (COPY / file).write_text(source)
        seconds = round(time.monotonic() - began, 1)
        results[key] = {"outcome": outcome, "tests": len(tests), "seconds": seconds}
        RESULTS.write_text(json.dumps(results, indent=1))
        print(f"{number:4d} {outcome:10s} {seconds:5.1f} s  {key}", flush=True)
    show(seed)


def equivalents() -> dict[str, str]:
    """``file: line | before -> after`` of changes that change nothing, and why."""
    path = ROOT / "tools" / "equivalent.toml"
    return tomllib.loads(path.read_text()) if path.exists() else {}


def show(seed: int | None = None) -> None:
    """Counts, and every change that no test noticed."""
    results = json.loads(RESULTS.read_text())
    results = {k: v for k, v in results.items() if seed is None or k.startswith(f"{seed} ")}
    equal = equivalents()
    for key, found in results.items():
        if found["outcome"] == "survived" and key.split(" ", 3)[3] in equal:
            found["outcome"] = "equivalent"
    counts = Counter(v["outcome"] for v in results.values())
    noticed, missed = counts["killed"] + counts["timeout"], counts["survived"] + counts["untested"]
    print(dict(counts), f"{noticed / max(1, noticed + missed):.1%} of {noticed + missed} noticed")
    for key, found in sorted(results.items()):
        if found["outcome"] in ("survived", "untested"):
            print(f"  {found['outcome']} after {found['tests']} tests: {key}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["map", "run", "show"])
    parser.add_argument("groups", nargs="*", default=[*GROUPS], help=", ".join(GROUPS))
    parser.add_argument("--tests", nargs="*", default=["tests"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--most", type=int, default=150, help="tests that a change is tried against"
    )
    given = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    if given.what == "map":
        draw_map(given.tests)
    elif given.what == "run":
        run(given.seed, given.count, given.groups or [*GROUPS], given.minutes, given.most)
    else:
        show()


if __name__ == "__main__":
    main()
