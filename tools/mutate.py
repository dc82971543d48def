"""Do the tests bite? One small change at a time in the package, and the tests that run the changed line.

    python tools/mutate.py map --tests tests/test_privacy_*.py      which test runs which line, and how long
    python tools/mutate.py run --seed 1 --count 300 privacy core    try so many changes, a process each
    python tools/mutate.py show                                     what came of them

All happens in a copy of the working tree under build/mutants, so that processes which tests start see the
change too. A run goes on where it was stopped. Changes that change nothing are named, with the reason, in
tools/equivalent.toml.
"""

import argparse
import json
import random
import time
import tomllib
from collections import Counter, defaultdict
from itertools import zip_longest
from pathlib import Path

from changes import GROUPS, ROOT, Mutant, bodies, group_of, mutants, mutate
from tries import COPY, MAP, PLACE, RESULTS, Case, Tries, draw_map, enter, fresh

USED = (
    "torch",
    "pytest",
    "numpy",
    "scipy.special",
    "opacus",
    "numba",
    "sklearn",
    "grpc",
)
"""Imported once for all."""


def draw(seed: int, count: int, groups: list[str]) -> list[Mutant]:
    """So many changes, as many of each group; a larger count begins with the same."""
    each = []
    for group in groups:
        found = mutants([group])
        random.Random(f"{seed} {group}").shuffle(found)
        each.append(found[: count // len(groups)])
    return [m for row in zip_longest(*each) for m in row if m]


def cases(drawn: list[Mutant], most: int, longest: float) -> list[Case]:
    """With the tests that run their line, of all those of the file where no line is seen to run.

    Likeliest first: a test of the module that is changed, and a quick one.
    """
    known = json.loads(MAP.read_text())
    whole: dict[str, set[str]] = defaultdict(set)
    for line, names in known["lines"].items():
        whole[line.partition(":")[0]] |= {*names}
    found = []
    for mutant in drawn:
        source = (ROOT / mutant.file).read_text()
        tree, old, new = mutate(source, mutant.place, mutant.k)
        name = f"{mutant.file}: {source.splitlines()[mutant.line - 1].strip()} | {old} -> {new}"
        near = "tests/test_" + "_".join(Path(mutant.file).with_suffix("").parts[1:])
        near = near.replace("_engines_", "_")
        seconds = {
            test: known["seconds"][test]
            for test in known["lines"].get(f"{mutant.file}:{mutant.line}") or whole[mutant.file]
        }
        tests: list[str] = []
        total = 0.0
        for test in sorted(seconds, key=lambda t: seconds[t] / (8 if t.startswith(near) else 1)):
            total += seconds[test]
            if total < longest or not tests:
                tests.append(test)
        limits = tuple(int(5 + 4 * seconds[t]) for t in tests[:most])
        made = bodies(source, tree, str(COPY / mutant.file))
        found.append(Case(mutant, name, tree, made, tuple(tests[:most]), limits))
    return found


def run(given: argparse.Namespace) -> None:
    """Try changes drawn by a seed; started again, those that nobody noticed are tried once more."""
    todo = cases(draw(given.seed, given.count, given.groups), given.most, given.longest)
    tries = Tries(time.monotonic() + 60 * given.minutes)
    equal, again = equivalents(), ("survived", "untested", "broken", "new")
    for case in todo:
        if case.name in equal:
            tries.results[case.key] = {"outcome": "equivalent", "tests": 0}
        elif tries.results.get(case.key, {"outcome": "new"})["outcome"].split()[0] in again:
            tries.cases.append(case)
    fresh()
    enter()
    for name in USED:
        __import__(name)
    tries.all()
    show()


def equivalents() -> dict[str, str]:
    """``file: line | before -> after`` of changes that change nothing, and why."""
    path = ROOT / "tools" / "equivalent.toml"
    return tomllib.loads(path.read_text()) if path.exists() else {}


def show() -> None:
    """Counts by group, and every change that no test noticed."""
    results, equal = json.loads(RESULTS.read_text()), equivalents()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for key, found in results.items():
        if found["outcome"] == "survived" and _named(key) in equal:
            found["outcome"] = "equivalent"
        for group in (group_of(_named(key).partition(":")[0]), "all"):
            counts[group][found["outcome"].split()[0]] += 1
    for group, of in counts.items():
        noticed, missed = of["killed"] + of["timeout"], of["survived"] + of["untested"]
        rate = noticed / max(1, noticed + missed)
        print(f"{group:8s} {rate:6.1%} of {noticed + missed} noticed; {dict(of)}")
    for key, found in sorted(results.items(), key=lambda pair: _named(pair[0])):
        if found["outcome"] not in ("killed", "timeout", "equivalent"):
            print(f"  {found['outcome']} after {found['tests']} tests: {key}")


def _named(key: str) -> str:
    return key.split(" ", 2)[2]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["map", "run", "show"])
    parser.add_argument("groups", nargs="*", default=[*GROUPS], help=", ".join(GROUPS))
    parser.add_argument("--tests", nargs="*", default=["tests"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--most", type=int, default=150, help="tests to try a change against")
    parser.add_argument("--longest", type=float, default=60, help="and their seconds together")
    given = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    if given.what == "map":
        draw_map(given.tests)
    elif given.what == "run":
        run(given)
    else:
        show()


if __name__ == "__main__":
    main()
