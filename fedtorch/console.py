"""What a person sees: a live bar on a terminal, plain lines when piped."""

import signal
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor


class Report:
    """Progress over rounds."""

    def __init__(self, rounds: int, start: int) -> None:
        """A bar from ``start`` to ``rounds`` where there is a terminal."""
        self.console = Console(highlight=False, soft_wrap=True)
        self.rounds = rounds
        self.bar = Progress(
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=rounds, completed=start)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False)

    def round(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """One round is done."""
        failed = metrics.get("failed") or metrics.get("nonprivate_failed") or {}
        for who, kind in failed.items():
            if kind == "nonfinite":
                self.say(
                    f"round {metrics['round']}: client {who} left out, its update is not finite"
                )
        parts = [
            f"{label} {metrics[key]:.4f}"
            for label, key in _shown(metrics)
            if metrics.get(key) is not None
        ]
        clients = metrics.get("clients", metrics.get("nonprivate_clients"))
        if clients is not None:
            parts.append(f"{clients / max(seconds, 1e-9):.1f} clients/s")
        line = "  ".join(parts)
        self.bar.update(self.task, completed=metrics["round"], description=line)
        if not self.console.is_terminal:
            self.say(f"round {metrics['round']:>4}/{self.rounds}  {line}")

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


class StopSignal:
    """Ctrl-C or SIGTERM: finish the round, save, exit with 128 + signal; a second one stops at once."""

    def __init__(self, report: Report) -> None:
        """Not asked to stop yet."""
        self.report = report
        self.asked = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Take over both signals."""
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


def _shown(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    tests = [(k.replace("_", " "), k) for k in metrics if k.startswith("test_")]
    private = [
        ("(not private) train loss", "nonprivate_train_loss"),
        ("epsilon", "privacy_epsilon"),
    ]
    return [("train loss", "train_loss"), *private, *tests]


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
        table.add_row(client[:24], str(len(part)), *counts)
    if len(ids) > most:
        table.add_row(f"... {len(ids) - most} more", "")
    return table
