"""What a person sees: a live bar on a terminal, plain lines when piped."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fedtorch.rounds.observers import Observer
from fedtorch.rounds.progress import summary, troubles

WIDE = 10_000
"""Letters in a line where nobody's window is too narrow for a table."""

SHORTEST, LONGEST = 10, 40
"""Letters of the bar in a narrow window and in a wide one."""


class _Screen(Console):
    """A console whose reader may go away, as with ``| head``: the run goes on without it."""

    def on_broken_pipe(self) -> None:
        """Nothing more is shown; what Python still holds for stdout goes nowhere."""
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def page(text: str) -> None:
    """A long text, whose reader may have seen enough, as with ``| head``."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nor does Python's own flush at the end find a reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Report(Observer):
    """Progress over rounds."""

    def __init__(self, rounds: int, start: int, times: bool = True) -> None:
        """A bar from ``start`` to ``rounds`` on a terminal or in a notebook, else lines.

        ``times``: with the time that is left, which tells how fast clients are.
        """
        self.console = _Screen(highlight=False)
        self.rounds = rounds
        live = self.console.is_terminal or self.console.is_jupyter
        self.lines = not live
        if not live:
            self.console.width = WIDE
        self.line = BarColumn(SHORTEST)
        self.taken = len(f"round {rounds}/{rounds}  ") + (len(" eta 0:00:00") if times else 0)
        self.bar = Progress(
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            self.line,
            TextColumn("{task.description}"),
            *([TextColumn("eta"), TimeRemainingColumn(compact=True)] if times else []),
            console=self.console,
            disable=not live,
        )
        self.task = self.bar.add_task("", total=rounds, completed=start)

    def say(self, text: str | Table) -> None:
        """A line or a table above the bar; a screen that cannot take it does not end a run."""
        with suppress(OSError):
            self.console.print(text, markup=False, soft_wrap=self.lines)

    def attempt(self, what: str, act: Callable[..., object], *args: object) -> None:
        """Write or tell what a run can do without; that it failed is one sentence, each time."""
        try:
            act(*args)
        except Exception as e:  # a full disk, a missing package, a library's own error
            reason = getattr(e, "strerror", None) or (str(e) or type(e).__name__).splitlines()[0]
            self.say(f"warning: {what} not written ({reason}); the run goes on without it")

    def round(self, figures: Mapping[str, Any]) -> None:
        """One round is done."""
        for line in troubles(figures):
            self.say(line)
        # a window may have become wider or narrower since the round before
        room = self.console.width - self.taken - SHORTEST - 1
        line = summary(figures, None if self.lines else room)
        self.line.bar_width = min(LONGEST, SHORTEST + max(0, room - len(line)))
        self.bar.update(self.task, completed=figures["round"], description=line)
        if self.lines:
            self.say(f"round {figures['round']:>4}/{self.rounds}  {line}")

    def __enter__(self) -> "Report":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()


class Remarks(logging.Handler):
    """What takes long and happens once, on the screen while a command runs: loops that are compiled."""

    def __enter__(self) -> "Remarks":
        """Listen to them."""
        self.log = logging.getLogger("fedtorch.kernels")
        self.before = self.log.level
        self.log.addHandler(self)
        self.log.setLevel(logging.INFO)
        return self

    def emit(self, record: logging.LogRecord) -> None:
        """A line of its own."""
        print(f"note: {record.getMessage()}", flush=True)

    def __exit__(self, *error: object) -> None:
        """Listen no more."""
        self.log.removeHandler(self)
        self.log.setLevel(self.before)


class StopSignal:
    """Ctrl-C or SIGTERM: finish the round, save, exit with 128 + signal; a second one stops at once."""

    def __init__(self, report: Report) -> None:
        """Not asked to stop yet."""
        self.report = report
        self.asked = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Take over both signals; in a thread that is not the main one Python lets nobody do so."""
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number: int, frame: Any) -> None:
        """Remember the first signal; give up on the second."""
        if self.asked:
            raise SystemExit(128 + number)
        self.asked = number
        self.report.say("stopping after this round (once more: at once, from the last checkpoint)")

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def partition_table(
    ids: Sequence[str], parts: Sequence[Tensor], labels: Tensor | None, most: int = 10
) -> Table:
    """Who got what: examples and classes of the first clients, and the range over all."""
    sizes = sorted(len(p) for p in parts)
    title = (
        f"{len(ids)} clients, {sum(sizes)} examples "
        f"(min {sizes[0]}, median {sizes[len(sizes) // 2]}, max {sizes[-1]})"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("client")
    table.add_column("examples", justify="right")
    classes = [] if labels is None else labels.unique().tolist()
    per_class = 0 < len(classes) <= 12
    for c in classes if per_class else ():
        table.add_column(str(c), justify="right", style="dim")
    for client, part in list(zip(ids, parts, strict=True))[:most]:
        own = [] if labels is None else labels[part].tolist()
        counts = [str(own.count(c) or "") for c in classes] if per_class else []
        table.add_row(Text(client[:24]), str(len(part)), *counts)
    if len(ids) > most:
        table.add_row(f"... {len(ids) - most} more", "")
    return table


def show_table(rows: Sequence[Mapping[str, Any]], spare: Sequence[str] = ()) -> None:
    """Rows of named values; in full when piped, fitted to the window on a terminal, or to COLUMNS.

    ``spare``: columns that are left out of a narrow window, the last first.
    """
    console = Console(highlight=False)
    if not _window(console):
        console.width = WIDE
    left, shown = 0, table_of(rows)
    free = console.options.update(width=10_000)
    while left < len(spare) and console.measure(shown, options=free).maximum > console.width:
        left += 1
        shown = table_of([{k: r[k] for k in r if k not in spare[-left:]} for r in rows])
    console.print(shown)
    if left:
        console.print(f"({left} more options differ: widen the window, or fedtorch runs --json)")


def show_line(text: str, aside: bool = False) -> None:
    """A sentence, broken between words on a terminal; ``aside``: where no program reads it."""
    console = Console(highlight=False, stderr=aside)
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def _window(console: Console) -> bool:
    """Whether there is a width to keep to; of a pipe the one that COLUMNS says."""
    return console.is_terminal or os.environ.get("COLUMNS", "").isdigit()


def fitting(rows: Sequence[Mapping[str, Any]], column: str, least: int = 9) -> int | None:
    """Letters that one column may have for the table to fit the window; None: there is no window."""
    console = Console(highlight=False)
    if not _window(console):
        return None
    whole = console.measure(table_of(rows), options=console.options.update(width=WIDE)).maximum
    own = max(len(column), *(len(_word(row.get(column))) for row in rows))
    return max(least, own - max(0, whole - console.width))


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of named values as a table."""
    table = Table(box=None, pad_edge=False)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        numbers = all(isinstance(r.get(name), (int, float, type(None))) for r in rows)
        table.add_column(name.replace("_", " "), justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(_word(row.get(name))) for name in names))
    return table


def _word(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(lines: Mapping[str, Sequence[tuple[float, float]]], title: str) -> str:
    """Curves in letters, each drawn with the first letter of its name; * where they meet.

    >>> print(plot({"A": [(1, 0.0), (2, 1.0)]}, "x").splitlines()[1].strip())
    1 |                                                           A
    """
    points = [p for line in lines.values() for p in line]
    if not points:
        return f"{title}: no rounds yet"
    width, height = 60, 12
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*points, strict=True))
    cells = [[" "] * width for _ in range(height)]
    for name, line in lines.items():
        for x, y in line:
            column = round((x - left) / (right - left or 1) * (width - 1))
            at = height - 1 - round((y - low) / (high - low or 1) * (height - 1))
            cells[at][column] = name[0] if cells[at][column] in (" ", name[0]) else "*"
    marks = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    rows = [f"{m:>8} |{''.join(c)}".rstrip() for m, c in zip(marks, cells, strict=True)]
    axis = f"{'':>8} +{'-' * width}"
    ends = f"{'':>9} {left:<{width // 2}g}{right:>{width // 2}g}"
    return "\n".join([title.replace("_", " "), *rows, axis, ends + " round"])
