"""Run the tests in a copy of the working tree: once to see what runs which line, then for each change."""

import ast
import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from changes import ROOT, Bodies, Mutant, functions, swap

PLACE = ROOT / "build" / "mutants"
COPY, MAP, RESULTS = PLACE / "copy", PLACE / "map.json", PLACE / "results.json"


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
    # what is not changed is not compiled again
    subprocess.run([sys.executable, "-m", "compileall", "-q", "fedtorch"], cwd=COPY, check=True)


def enter() -> None:
    """Work in the copy, and let every process that is started from here do so."""
    os.chdir(COPY)
    sys.path[:] = [
        str(COPY),
        *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tools")),
        str(COPY / "tools"),  # processes that are started afresh import this file again
    ]
    os.environ |= {"PYTHONPATH": str(COPY), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True


ENOUGH = 3000
"""Lines of a function that are noted in one test: a loop shows nothing new after so many."""


class Tracer:
    """A pytest plugin: lines of the package that each test runs in this process, and its seconds."""

    def __init__(self) -> None:
        self.lines: dict[str, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.now: set[tuple[str, int]] = set()
        self.files: dict[str, str | None] = {}
        self.left: dict[CodeType, int] = {}
        self.within = str(COPY / "fedtorch") + os.sep

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        """Follow what is in the package, the first ENOUGH lines of each function."""
        code = frame.f_code
        if (file := self.files.get(code.co_filename, "")) == "":
            inside = code.co_filename.startswith(self.within)
            file = code.co_filename[len(str(COPY)) + 1 :] if inside else None
            self.files[code.co_filename] = file
        if file is None or self.left.get(code) == 0:
            return None
        left, now = self.left, self.now
        left.setdefault(code, ENOUGH)
        now.add((file, frame.f_lineno))

        def lines(frame: Any, event: str, arg: Any) -> Any:
            now.add((file, frame.f_lineno))
            left[code] -= 1
            return lines if left[code] > 0 else stop(frame)

        def stop(frame: Any) -> None:
            left[code], frame.f_trace_lines = 0, False

        return lines

    def pytest_runtest_protocol(self, item: Any) -> None:
        """A test begins."""
        self.now, self.left = set(), {}
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A part of it has ended: setting up, the test itself, or tidying up."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        self.failed |= {report.nodeid} if report.failed else set()
        if report.when == "teardown":
            sys.settrace(None)
            threading.settrace(None)
            for file, line in self.now:
                self.lines[f"{file}:{line}"].add(report.nodeid)


def draw_map(tests: list[str]) -> None:
    """Run the tests once and note what each runs; files mapped before are kept."""
    fresh()
    enter()
    import pytest

    saved = json.loads(MAP.read_text()) if MAP.exists() else {"lines": {}, "seconds": {}}
    for file in tests:
        tracer = Tracer()
        pytest.main(["-q", "-n0", "-p", "no:cacheprovider", file], plugins=[tracer])
        saved["seconds"] |= tracer.seconds
        for line, names in tracer.lines.items():
            kept = {*saved["lines"].get(line, []), *names} - tracer.failed
            saved["lines"][line] = sorted(kept)
        MAP.write_text(json.dumps(saved))


WORDS = {0: "survived", 1: "killed", -signal.SIGPROF: "timeout"}
"""What the end of a process with tests says: timeout is work without end; any other is no word."""


class Case(NamedTuple):
    """A change to try: its name, what it makes of the file, and the tests, the likeliest first."""

    mutant: Mutant
    name: str
    tree: ast.Module
    bodies: Bodies | None
    tests: tuple[str, ...]
    limits: tuple[int, ...]

    @property
    def key(self) -> str:
        """What its result is kept under."""
        return f"{self.mutant.place}.{self.mutant.k} {self.mutant.line} {self.name}"


class Tries:
    """Cases, each tried in a process of its own.

    A pytest plugin: tests are collected once, and a child of that process runs some with the changed
    function put in. What runs as a file is imported is tried in a process that imports all anew.
    """

    def __init__(self, end: float) -> None:
        self.cases: list[Case] = []
        self.end = end
        self.results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self.screen = os.fdopen(os.dup(1), "w")
        self.functions: dict[str, list[FunctionType]] = {}
        self.child = False

    def all(self) -> None:
        """First those that a change within a process can show, then those that need new imports."""
        within = [case for case in self.cases if case.bodies is not None]
        files = sorted({test.partition("::")[0] for case in within for test in case.tests})
        if files:
            self.cases, rest = within, [case for case in self.cases if case.bodies is None]
            _end_of(lambda: self.pytest(files), self.end + 1200 - time.monotonic())
            self.cases = rest
            self.results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for case in self.cases:
            if case.bodies is None:
                self.attempt(case, self.anew, "anew")

    def pytest(self, tests: Sequence[str]) -> int:
        """Run tests here; a failed one is noted."""
        import pytest

        place = f"--basetemp={PLACE / 'temp'}"
        flags = ["-q", "-n0", "-x", "-p", "no:cacheprovider", "-o", "timeout=0", place]
        return int(pytest.main([*flags, *tests], plugins=[self]))

    def anew(self, case: Case) -> int:
        """A process in which the package has never been imported."""
        self.child = True
        _limit(sum(case.limits))
        # with all their parameters, whose names a change of a default alters
        return self.pytest([*dict.fromkeys(test.partition("[")[0] for test in case.tests)])

    def pytest_runtestloop(self, session: Any) -> bool | None:
        """Instead of all tests once: for each case its tests, in a child of this process."""
        if self.child:
            return None
        items = {item.nodeid: item for item in session.items}
        gc.collect()
        self.functions = functions(COPY)
        gc.freeze()  # and children share what is in memory
        for case in self.cases:
            self.attempt(case, lambda case: self.within(case, session, items), "within")
        self.control(session, items)
        return True

    def control(self, session: Any, items: dict[str, Any]) -> None:
        """Whatever noticed a change must pass without one, or has noticed nothing."""
        tried = {case.key for case in self.cases} & {*self.results}
        noticed = {self.results[key]["by"] for key in tried}
        todo = [item for name, item in items.items() if name in noticed]

        def work() -> int:
            for item, after in zip(todo, [*todo[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            return 0

        (PLACE / "noticed").write_text("")
        print(f"{len(todo)} tests without a change: exit", file=self.screen, end=" ", flush=True)
        print(_end_of(work, 900), file=self.screen, flush=True)
        for name in (PLACE / "noticed").read_text().split("\n"):
            for key, found in self.results.items():
                if name and found.get("by") == name:
                    self.results[key] = found | {"outcome": "broken: its test fails anyway"}
                    print(f"broken: {name}: {key}", file=self.screen, flush=True)
        RESULTS.write_text(json.dumps(self.results, indent=1))

    def within(self, case: Case, session: Any, items: dict[str, Any]) -> int:
        """A process in which everything is imported, and the changed function is put in."""
        assert case.bodies is not None
        swap(self.functions[str(COPY / case.mutant.file)], case.bodies)
        todo = [(items[t], n) for t, n in zip(case.tests, case.limits, strict=True) if t in items]
        for (item, limit), after in zip(todo, [*todo[1:], (None, 0)], strict=True):
            _limit(limit)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after[0])
            if session.testsfailed:
                return 1
        return 0 if todo else 2

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Which test noticed."""
        if report.failed:
            with (PLACE / "noticed").open("a") as file:
                file.write(report.nodeid + "\n")

    def attempt(self, case: Case, work: Callable[[Case], int], how: str) -> None:
        """Try one, and keep what came of it."""
        if time.monotonic() > self.end:
            return
        began, path = time.monotonic(), COPY / case.mutant.file
        source, stamp = path.read_text(), path.stat()
        (PLACE / "noticed").write_text("")
        path.write_text(ast.unparse(case.tree) + "\n")
        code = (
            _end_of(lambda: work(case), 60 + 70 * len(case.tests) + 10 * sum(case.limits))
            if case.tests
            else 2
        )
        path.write_text(source)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        found = {
            "outcome": WORDS.get(code, f"broken {code}") if case.tests else "untested",
            "tests": len(case.tests),
            "seconds": round(time.monotonic() - began, 1),
            "by": (PLACE / "noticed").read_text().partition("\n")[0],
            "how": how,
        }
        self.results[case.key] = found
        RESULTS.write_text(json.dumps(self.results, indent=1))
        said = (
            f"{len(self.results):4d} {found['outcome']:10s} {found['seconds']:5.1f} s  {case.key}"
        )
        print(said, file=self.screen, flush=True)


def _limit(seconds: int) -> None:
    """End this process after so much work of its own, or a long wait: for others, or for a busy machine."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(60 + 10 * seconds)


def _end_of(work: Callable[[], int], limit: float) -> int:
    """How a child ends that does this; what it leaves running ends with it."""
    child = os.fork()
    if not child:
        os.setsid()
        quiet = os.open(PLACE / "child.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = 70
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + limit
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(done[1] if done[0] else os.waitpid(child, 0)[1])
