"""``fedtorch runs`` and ``fedtorch compare``: what ran, how it went, and what made the difference."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedtorch.commands.options import words_and_options
from fedtorch.run import compared, prices
from fedtorch.run import results as saved
from fedtorch.run.console import fitting, plot, show_line, show_table
from fedtorch.types import ConfigError


def runs(argv: Sequence[str]) -> int:
    """A table of the runs in a folder (``runs`` unless another is named)."""
    words, given = words_and_options(argv, "runs", {"json": False, "sort": True, "where": True})
    if len(words) > 1:
        raise ConfigError(f"fedtorch runs takes one folder, but got {len(words)}")
    everything = saved.find_runs(words[0] if words else "runs")
    print_damaged(everything)
    found = saved.chosen(everything, given.get("where", ""), given.get("sort", ""))
    if "json" in given:
        print(json.dumps(saved.summary_rows(found) if found else [], indent=2))
    elif found:
        show_runs(found)
    else:
        print(f"none of {len(everything)} runs is so")
    if found:
        tell_prices(found, "json" in given)
    return 0


def show_runs(found: Sequence[saved.Saved]) -> None:
    """The table of runs, cut to the window: options that differ go first, then middles of names."""
    table = saved.screen_table(found)
    spare = [k for k in dict.fromkeys(k for row in table for k in row) if k not in SHOWN]
    first = next((k for k in table[0] if k not in SHOWN and f"test_{k}" in found[0].result()), "")
    spare = sorted((k for k in spare if k != first), key=lambda name: name.count("."))
    room = fitting([{k: v for k, v in row.items() if k not in spare} for row in table], "run")
    show_table(saved.screen_table(found, room), spare)


SHOWN_CLIENTS = 20
"""Clients that compare shows of many, the most different first."""

SHOWN = ("run", "data", "model", "strategy", "privacy", "epsilon", "seconds", "state")
"""Columns of the table of runs in every window."""


def compare(argv: Sequence[str]) -> int:
    """Two runs side by side: options that differ, results, curves; ``--png FILE`` draws them."""
    words, given = words_and_options(argv, "compare", {"json": False, "png": True})
    if len(words) != 2:
        raise ConfigError(f"fedtorch compare takes two run folders, but got {len(words)}")
    pair = [saved.load(word) for word in words]
    print_damaged(pair)
    found = compared.sides(*pair)
    names = ("A", "B")
    metrics = [
        k
        for k in dict.fromkeys(k for r in pair for k in r.history.last())
        if k.startswith("test_") or k in ("train_loss", "privacy_epsilon")
    ]
    if "png" in given:
        draw(dict(zip(words, pair, strict=True)), metrics, Path(given["png"]))
    if "json" in given:
        print(
            json.dumps(
                {k: v for k, v in vars(found).items() if v or k in ("options", "results")}, indent=2
            )
        )
        tell_prices(pair, True)
        return 0
    for title, table in (("options that differ", found.told()), ("results", found.results)):
        if table:
            show_table([{title: k, "A": a, "B": b} for k, (a, b) in table.items()])
        else:
            print("the options are the same")
    mark = "(not private) " if any(r.private for r in pair) else ""
    for metric, own in found.clients.items() if not any(r.strict for r in pair) else ():
        show_pairs(f"{mark}clients by {metric.replace('_', ' ')}", own)
    show_pairs("share right by class", found.classes)
    tell_prices(pair, False)
    best = next((m for m in metrics if m.startswith("test_") and m != "test_loss"), "test_loss")
    print(plot({n: r.history.column(best) for n, r in zip(names, pair, strict=True)}, best))
    return 0


def show_pairs(title: str, pairs: Mapping[str, Sequence[float]]) -> None:
    """What both runs have, in this order."""
    rows = [{title: k, "A": a, "B": b, "B - A": b - a} for k, (a, b) in pairs.items()]
    if rows:
        show_table(rows[:SHOWN_CLIENTS])
    if len(rows) > SHOWN_CLIENTS:
        print(f"({len(rows) - SHOWN_CLIENTS} more: fedtorch compare --json)")


def print_damaged(found: Sequence[saved.Saved]) -> None:
    """What is damaged in run folders: beside the output, which may be for a program."""
    for note in (n for run in found for n in run.notes):
        print(f"warning: {note}", file=sys.stderr)


def tell_prices(found: Sequence[saved.Saved], aside: bool) -> None:
    """What private runs over the same data cost together; ``aside``: where no program reads it."""
    # two names for one folder are one run
    own = {run.folder.resolve(): run for run in found}
    for line in prices.spent([*own.values()]):
        show_line(line, aside)


def draw(runs: Mapping[str, saved.Saved], metrics: Sequence[str], path: Path) -> None:
    """The runs' curves into a PNG file."""
    from fedtorch.tracking.drawings import curves

    lines = {m: {n: r.history.column(m) for n, r in runs.items()} for m in metrics}
    if not any(line for own in lines.values() for line in own.values()):
        raise ConfigError("no run has a finished round to draw")
    try:
        path.write_bytes(curves(lines))
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
