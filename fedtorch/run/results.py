"""Run folders read back: options, figures round by round, and how it ended."""

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtorch.options import near
from fedtorch.rounds.history import History
from fedtorch.run import cli, shown
from fedtorch.run import files as runs
from fedtorch.training.metrics import known, worse
from fedtorch.types import ConfigError


@dataclass(frozen=True)
class Saved:
    """A run folder."""

    folder: Path
    options: dict[str, Any]
    """By dotted name."""
    history: History
    summary: dict[str, Any]
    """``summary.json`` of a run that came to its end, else empty."""
    notes: tuple[str, ...] = ()
    """What is damaged in the folder, a sentence each."""
    shown: dict[str, Any] = field(default_factory=dict)
    """``report.json``: rounds asked for, who holds what, the confusion matrix; empty for older runs."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def private(self) -> bool:
        """Whether it has a privacy plan."""
        planned = self.options.get("privacy") not in (None, "null", "none")
        return planned or "privacy_epsilon" in self.history.last()

    @property
    def strict(self) -> bool:
        """Whether nothing of it is told but what the guarantee covers."""
        return self.options.get("privacy.strict") is True

    @property
    def planned(self) -> int:
        """Rounds that were asked for, when it was started last."""
        asked = [self.shown.get("rounds"), self.options.get("rounds"), self.rounds]
        return next(n for n in asked if isinstance(n, int))

    @property
    def rounds(self) -> int:
        """Rounds that are done; what is damaged may know of fewer."""
        told = self.summary.get("rounds")
        return max(int(self.history.last().get("round", 0)), told if type(told) is int else 0)

    @property
    def ended(self) -> bool:
        """Whether it came to its end, and was not taken up again since."""
        return bool(self.summary) and self.summary.get("rounds", self.rounds) == self.rounds

    def state(self) -> str:
        """``done``, ``stopped 3/9`` before all rounds were trained; ``round 3/9``: under way, or killed."""
        if not self.ended:
            return f"round {self.rounds}/{self.planned}"
        if self.rounds < self.planned:
            return f"stopped {self.rounds}/{self.planned}"
        return "nothing learned" if self.summary.get("learned") is False else "done"

    def result(self) -> dict[str, Any]:
        """What a table of runs shows: state, last figures, epsilon and time."""
        last = self.history.last()
        tests = {k: v for k, v in last.items() if k.startswith("test_")}
        epsilon = last.get("privacy_epsilon", self.summary.get("epsilon"))
        return {
            "run": str(self.folder),
            "state": self.state(),
            **tests,
            "epsilon": epsilon,
            "seconds": last.get("seconds_elapsed", self.summary.get("seconds")),
        }


def load(folder: str | Path) -> Saved:
    """Raises ConfigError when the folder holds no run; what is damaged in it is noted."""
    folder = Path(folder)
    if not (folder / "config.toml").is_file():
        inside = sorted(p.parent for p in folder.glob("*/config.toml"))[:2]
        fix = f"; name one of those in it, as {' or '.join(map(str, inside))}" if inside else ""
        what = "is a file, and" if folder.is_file() else ""
        raise ConfigError(
            " ".join(f"{folder} {what} holds no run (there is no config.toml in it){fix}".split())
        )
    notes, options, history, ended = runs.changed(folder), {}, History(), {}
    kept: dict[str, Any] = {}
    try:
        options = cli.flat(cli.read(folder / "config.toml"))
    except ConfigError as e:
        notes.append(str(e))
    try:
        history = History.load(folder)
    except (ConfigError, OSError) as e:
        notes.append(str(e))
    try:
        ended = _summary(folder / "summary.json")
    except (ValueError, OSError, RecursionError) as e:
        notes.append(f"{folder / 'summary.json'} is damaged: {e}")
    try:
        kept = shown.read(folder)
    except ConfigError as e:
        notes.append(str(e))
    return Saved(folder, options, history, ended, tuple(notes), kept)


def _summary(path: Path) -> dict[str, Any]:
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(table, dict):
        raise ValueError("it holds no table")
    return table


def find_runs(folder: str | Path) -> list[Saved]:
    """Every run in a folder and below it, by name; raises ConfigError when there is none."""
    found = sorted(Path(folder).rglob("config.toml")) if Path(folder).is_dir() else []
    if not found:
        raise ConfigError(f"there are no runs in {folder}; name the folder that holds them")
    return [load(path.parent) for path in found]


def summary_rows(runs: Sequence[Saved]) -> list[dict[str, Any]]:
    """A row for each run: its name, the options in which the runs differ, and its result."""
    common = runs[0].folder.parent
    while not all(r.folder.is_relative_to(common) for r in runs):
        common = common.parent
    changing = differing([r.options for r in runs])
    made = []
    for r in runs:
        result = r.result()
        name = {"run": str(r.folder.relative_to(common))} if len(runs) > 1 else {}
        options = {k: r.options.get(k) for k in changing}
        made.append({"run": result.pop("run")} | name | options | result)
    return made


def screen_table(runs: Sequence[Saved], room: int | None = None) -> list[dict[str, Any]]:
    """What a screen shows of each run; names of runs are cut in their middle to fit ``room`` letters."""
    made = []
    for run, row in zip(runs, summary_rows(runs), strict=True):
        options, scores = (
            run.options,
            [k for k in row if k.startswith("test_") and k != "test_loss"],
        )
        sites = options.get("sites")
        shown = {
            "run": row["run"],
            "data": f"{len(sites)} sites" if isinstance(sites, list) else options.get("dataset"),
            "model": options.get("model"),
            "strategy": options.get("strategy"),
            "privacy": str(options.get("privacy")).replace("null", "none"),
            **{k.removeprefix("test_"): row[k] for k in scores[:1]},
            "epsilon": row["epsilon"],
            "seconds": None if row["seconds"] is None else round(row["seconds"], 1),
            "state": row["state"].removeprefix("round "),
        }
        others = [k for k in row if k not in (*scores[:1], *shown, "dataset", "run_dir")]
        made.append(shown | {k: row[k] for k in others})
    if room is not None:
        for row in made:
            row["run"] = cut(str(row["run"]), room)
    return made


def cut(name: str, room: int) -> str:
    """A name in so many letters: its middle is left out, as its end tells runs apart."""
    head = room // 3
    return name if len(name) <= room else f"{name[:head]}…{name[len(name) - (room - head - 1) :]}"


CONDITION = re.compile(r"([\w.-]+)(!=|>=|<=|=|<|>)(.*)")
TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le,
    ">=": operator.ge,
}  # fmt: skip


def chosen(runs: Sequence[Saved], where: str = "", sort: str = "") -> list[Saved]:
    """The runs of which ``where`` is true (``strategy=fedprox,accuracy>0.9``), the best by ``sort`` first.

    Both name columns, options or figures. Raises ConfigError where no run has one of that name.
    """
    kept = list(runs)
    for condition in filter(None, where.split(",")):
        found = CONDITION.fullmatch(condition.strip())
        if not found:
            raise ConfigError(
                f"--where takes option=value, also with < or >, but got {condition!r}"
            )
        name, test, text = found.groups()
        if test in "<>" and not _number(text):
            raise ConfigError(f"--where compares numbers by {test}, but got {condition!r}")
        values = {id(r): value(r, name) for r in runs}
        _named(name, values.values(), runs)
        kept = [r for r in kept if _true(values[id(r)], test, text)]
    if sort:
        values = {id(r): value(r, sort) for r in runs}
        _named(sort, values.values(), runs)
        high = higher_is_better(sort)
        there = [r for r in kept if values[id(r)] is not None]
        numbers = all(isinstance(values[id(r)], (int, float)) for r in there)
        there.sort(key=lambda r: values[id(r)] if numbers else str(values[id(r)]), reverse=high)
        kept = there + [r for r in kept if values[id(r)] is None]
    return kept


def value(run: Saved, name: str) -> Any:
    """What a run has of this name: a column of the table, an option, a figure; None: nothing."""
    (shown,) = screen_table([run])
    key = name.replace("-", "_")
    for having in (shown, run.options, run.history.last()):
        for one in (name, key, f"test_{key}"):
            if having.get(one) is not None:
                return having[one]
    return None


def _named(name: str, values: Iterable[Any], runs: Sequence[Saved]) -> None:
    if all(v is None for v in values):
        names = {k for r in runs for k in (*screen_table([r])[0], *r.options)}
        raise ConfigError(f"no run has {name!r}{near(name, names) or '; see fedtorch runs --json'}")


def _number(text: str) -> bool:
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


def _true(value: Any, test: str, text: str) -> bool:
    try:
        number = float(text)
        return isinstance(value, (int, float)) and TESTS[test](value, number)
    except ValueError:
        return TESTS[test](str(value).lower(), text.lower())


def higher_is_better(name: str) -> bool:
    """Whether more of a figure is better; of a loss, less."""
    metric = known(name.replace("-", "_").removeprefix("test_"))
    return metric is not None and worse(metric) == "low"


def differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose value is not the same in all tables."""
    names = dict.fromkeys(name for table in tables for name in table)
    return [n for n in names if any(t.get(n) != tables[0].get(n) for t in tables)]
