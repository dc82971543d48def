"""What is said of a round while training goes on, and the bar of ``Server.fit``."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BAR_WIDTH = 20
"""Characters of the bar."""

SHOWN = 5
"""Clients that a line names; the record has all."""


def amount(n: int, what: str) -> str:
    """1 round, 2 rounds."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def troubles(figures: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing of a round that went wrong."""
    number, failed = figures["round"], _either(figures, "failed") or {}
    said = [
        f"round {number}: client {who} left out, its update is not finite"
        for who, kind in failed.items()
        if kind == "nonfinite"
    ]
    if few := _either(figures, "too_few"):
        return [*said, f"round {number}: {few}; the model stays as it was"]
    if left := _either(figures, "left_out"):
        took = [i for i in _either(figures, "cohort") or [] if i not in left]
        all_named = 0 < len(took) <= SHOWN < len(left)
        what = f"took {_first_few(took)} alone" if all_named else f"left out {_first_few(left)}"
        said.append(f"round {number}: the aggregator {what}")
    if far := _either(figures, "far"):
        said.append(f"round {number}: far from all others is the update of {_first_few(far)}")
    if clamped := _either(figures, "clamped"):
        said.append(
            f"round {number}: {clamped:,} numbers of updates were beyond aggregator.range, and clamped to "
            "it: raise it if there are many"
        )
    if _either(figures, "nobody"):
        said.append(f"round {number}: no client counted, the model stays as it was")
    if figures.get("step_failed"):
        said.append(
            f"round {number}: failed, the server's step is not finite; the model of the round before is "
            "kept: lower lr or the server's learning rate"
        )
    return said


def _first_few(ids: Sequence[str]) -> str:
    """The first few ids, and how many more."""
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return ", ".join(ids[:SHOWN]) + more


def parts(figures: Mapping[str, Any]) -> list[str]:
    """What is told of a round, what matters most first: test scores, epsilon, losses, speed."""
    tests = [k for k in figures if k.startswith("test_")]
    first = [k for k in tests if k != "test_loss"][:1] or tests
    shown = {
        **{k.replace("_", " "): k for k in first},
        "epsilon": "privacy_epsilon",
        **{k.replace("_", " "): k for k in tests if k not in first},
        "noised accuracy": "noised_accuracy",
        "noised loss": "noised_loss",
        "train loss": "train_loss",
        "(not private) train loss": "nonprivate_train_loss",
    }
    told = [
        f"{label} {figures[k]:.4f}".replace(" nan", " -")
        for label, k in shown.items()
        if figures.get(k) is not None
    ]
    if (clock := figures.get("simulated_seconds")) is not None:
        told.append(f"clock {clock:,.0f} s")
    speed = _either(figures, "clients_per_second")
    return told if speed is None else [*told, f"{speed:.1f} clients/s"]


def summary(figures: Mapping[str, Any], width: int | None = None) -> str:
    """A round in a line of at most ``width`` characters: what matters less is left out first."""
    told = parts(figures)
    while width is not None and len(told) > 1 and len("  ".join(told)) > width:
        told.pop()
    return "  ".join(told)


def _either(figures: Mapping[str, Any], name: str) -> Any:
    return figures.get(name, figures.get(f"nonprivate_{name}"))


def _in_a_notebook() -> bool:
    python: Any = sys.modules.get("IPython")
    return python is not None and hasattr(python.get_ipython(), "kernel")


class Bar:
    """One line that is written over and over, on a terminal and in a notebook; none elsewhere."""

    def __init__(self, rounds: int, shown: bool = True) -> None:
        """``rounds`` is the last one to come; ``shown``: whether anything is said at all."""
        self.rounds, self.shown = rounds, shown
        self.live = _in_a_notebook() or (sys.stdout.isatty() and os.environ.get("TERM") != "dumb")
        self.drawn = False

    def say(self, *lines: str) -> None:
        """Lines of their own, over the bar."""
        for line in lines if self.shown else ():
            print(("\r" + line).ljust(self._wide) if self.drawn else line, flush=True)
            self.drawn = False

    def round(self, figures: Mapping[str, Any]) -> None:
        """One round is done."""
        self.say(*troubles(figures))
        if self.live and self.shown:
            done = figures["round"] / max(self.rounds, 1)
            bar = ("#" * round(done * BAR_WIDTH)).ljust(BAR_WIDTH, ".")
            head = f"round {figures['round']}/{self.rounds} {bar} "
            line = head + summary(figures, self._wide - len(head))
            print("\r" + line[: self._wide].ljust(self._wide), end="", flush=True)
            self.drawn = True

    def close(self) -> None:
        """Leave the line as it stands."""
        if self.drawn:
            print()
        self.drawn = False

    @property
    def _wide(self) -> int:
        return shutil.get_terminal_size().columns - 1


class Interrupts:
    """SIGINT in the main thread: the first one is remembered, the next raises KeyboardInterrupt."""

    def __init__(self, say: Callable[[str], object]) -> None:
        """``say`` is told what comes of it."""
        self.say, self.asked = say, False
        self.before: Any = None

    def __enter__(self) -> "Interrupts":
        """Take the signal over, but where somebody has given it a meaning of their own."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self.before = signal.signal(signal.SIGINT, self.on_signal)
        return self

    def on_signal(self, number: int, frame: Any) -> None:
        """Remember the first, give up on the second."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say("stopping after this round (interrupt once more: at once)")

    def __exit__(self, *error: object) -> None:
        """Give the signal back."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
