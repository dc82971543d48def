"""Run folders read back: options, figures round by round, and how it ended."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtorch.rounds.history import History
from fedtorch.run import cli
from fedtorch.run import files as runs
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

    def result(self) -> dict[str, Any]:
        """What a table of runs shows: state, last figures, epsilon and time."""
        last = self.history.last()
        rounds = int(last.get("round", 0))
        planned = self.options.get("rounds")
        planned = planned if isinstance(planned, int) else rounds
        tests = {k: v for k, v in last.items() if k.startswith("test_")}
        epsilon = last.get("privacy_epsilon", self.summary.get("epsilon"))
        done = "nothing learned" if self.summary.get("learned") is False else "done"
        return {
            "run": str(self.folder),
            "state": done if self.summary and rounds >= planned else f"round {rounds}/{planned}",
            **tests,
            "epsilon": epsilon,
            "seconds": last.get("seconds_elapsed", self.summary.get("seconds")),
        }


def load(folder: str | Path) -> Saved:
    """Raises ConfigError when the folder holds no run; what is damaged in it is noted."""
    folder = Path(folder)
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} holds no run (there is no config.toml in it)")
    notes, options, history, ended = runs.changed(folder), {}, History(), {}
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
    return Saved(folder, options, history, ended, tuple(notes))


def _summary(path: Path) -> dict[str, Any]:
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(table, dict):
        raise ValueError("it holds no table")
    return table


def find(folder: str | Path) -> list[Saved]:
    """Every run in a folder and below it, by name; raises ConfigError when there is none."""
    found = sorted(Path(folder).rglob("config.toml")) if Path(folder).is_dir() else []
    if not found:
        raise ConfigError(f"there are no runs in {folder}; name the folder that holds them")
    return [load(path.parent) for path in found]


def rows(runs: Sequence[Saved]) -> list[dict[str, Any]]:
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


def differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose value is not the same in all tables."""
    names = dict.fromkeys(name for table in tables for name in table)
    return [n for n in names if any(t.get(n) != tables[0].get(n) for t in tables)]
