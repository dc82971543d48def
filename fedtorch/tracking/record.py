"""The record of one run: passes figures on, keeps the history, never stops the training."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.rounds.history import FILE, sift
from fedtorch.rounds.observers import Observer
from fedtorch.tracking.base import Tracker, Tracking
from fedtorch.tracking.tags import Judged, overview, tag_of

Metrics = Mapping[str, Any]

Seal = Mapping[str, Any]
"""``metrics.jsonl`` at a checkpoint: ``bytes`` and their ``sha256``."""

Say = Callable[[str], None]


class Record(Observer):
    """Writes down a run while it trains.

    A tracker that fails (a full disk, a server that is gone) is warned of once and left alone; the
    training goes on. Pictures are drawn in a thread beside the training, from copies of what they show.
    """

    def __init__(
        self,
        tracking: Tracking | None,
        folder: Path,
        start: int,
        say: Callable[[str], None],
        private: bool = False,
        seal: Seal | None = None,
    ) -> None:
        """``start`` is the round the run continues after, 0 for a new run; ``seal`` of the record then.

        In a ``private`` run what shows client data goes under ``nonprivate/``.
        """
        self.say, self.private = say, private
        self.tracking = tracking
        self.tracker: Tracker | None = tracking.open(folder, start) if tracking else None
        self.lines: Lines | None = Lines(folder, start, seal, say)
        self.history = [dict(m) for m in self.lines.before]
        """Figures of every round so far, those before a resume too."""
        self.seconds = 0.0
        """Seconds that recording the last round took."""
        before = self.history[-1].get("seconds_elapsed", 0.0) if self.history else 0.0
        self.began = time.perf_counter() - before
        self.mark: Callable[[dict[str, Any]], dict[str, Any]] = dict
        """The record's own figures that may be told."""
        self.judged: Judged = ("loss", "high")
        """The metric that the overview shows."""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self.drawing: list[tuple[str, int, Future[bytes]]] = []

    def strictly(self, mark: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Tell no more than ``mark`` lets through, and no times at all."""
        self.mark = mark
        if self.tracker is not None:
            self.tracker.timeless()

    def due(self, step: int, rounds: int, sets: int) -> bool:
        """Whether this round of ``rounds`` gets its set; ``sets`` in all unless options say how often."""
        if self.tracking is None or self.tracker is None:
            return False
        every = self.tracking.every or -(-rounds // sets)
        return step % every == 0 or step == rounds

    def config(self, table: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The options of the run by dotted name, and the tags it is judged by."""
        self._pass("config", table, metrics, self.private)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Markdown: the resolved config, a privacy report."""
        self._pass("text", tag, text, step)

    def round(self, figures: Metrics) -> Metrics:
        """Write down one round's figures and the record's own, which are returned."""
        start = time.perf_counter()
        own = self.mark({"seconds_log": self.seconds, "seconds_elapsed": start - self.began})
        metrics = {**figures, **own}
        self.history.append(metrics)
        if self.lines is not None:
            self._try("metrics.jsonl", self.lines.write, metrics)
        scalars = {
            tag: float(value)
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and (tag := tag_of(name))
        }
        self._pass("scalars", overview(scalars, self.judged) | scalars, int(metrics["round"]))
        self._collect(wait=False)
        self._pass("flush")
        self.seconds = time.perf_counter() - start
        return own

    def seal(self) -> Seal | None:
        """Size and digest of ``metrics.jsonl`` for a checkpoint; None if it could not be written."""
        self.sync()
        return self.sealed()

    def sealed(self) -> Seal | None:
        """The same before it is known to be on disk."""
        return None if self.lines is None else self.lines.sealed()

    def sync(self) -> None:
        """Have on disk what ``metrics.jsonl`` has by now."""
        if self.lines is not None:
            disk.sync(self.lines.file)

    def picture(self, tag: str, step: int, draw: Callable[..., bytes], *args: Any) -> None:
        """Draw beside the training; ``args`` must not change any more."""
        if self.tracker is not None:
            self.drawing.append((tag, step, self.thread.submit(draw, *args)))

    def pass_on(self, what: str, *args: Any) -> None:
        """Histograms, graph, points: straight to the tracker."""
        start = time.perf_counter()
        self._pass(what, *args)
        self.seconds += time.perf_counter() - start

    def __enter__(self) -> "Record":
        """Use as a context manager, so that files are closed whatever happens."""
        return self

    def __exit__(self, *error: object) -> None:
        """Write the pictures still being drawn and close everything."""
        ended = error[0] is None
        self._collect(wait=ended)
        if ended:
            self._pass("finish")
        self.thread.shutdown(wait=False, cancel_futures=True)
        self._pass("close")
        if self.lines is not None:
            self._try("metrics.jsonl", self.lines.close)

    def _collect(self, wait: bool) -> None:
        ready = [d for d in self.drawing if wait or d[2].done()]
        self.drawing = [d for d in self.drawing if d not in ready]
        for tag, step, drawn in ready:
            self._try(f"picture {tag}", lambda d=drawn, t=tag, s=step: self._draw(d, t, s))

    def _draw(self, drawn: Future[bytes], tag: str, step: int) -> None:
        self._pass("picture", tag, drawn.result(), step)

    def _pass(self, what: str, *args: Any) -> None:
        if self.tracker is not None:
            self._try(type(self.tracker).__name__, getattr(self.tracker, what), *args)

    def _try(self, who: str, act: Callable[..., None], *args: Any) -> None:
        # whatever goes wrong while writing down must not cost the training that is written about
        try:
            act(*args)
        except Exception as e:
            reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
            self.say(f"warning: {who} failed ({reason}); the run goes on without it")
            broken: Lines | Tracker | None
            if who == "metrics.jsonl":
                broken, self.lines = self.lines, None
            elif not who.startswith("picture"):
                broken, self.tracker = self.tracker, None
            else:
                return
            if broken is not None:
                with suppress(Exception):  # closing may fail for the same reason
                    broken.close()


class Lines:
    """``metrics.jsonl``: a line a round. What a killed run wrote after its checkpoint is cut away first."""

    def __init__(
        self, folder: Path, start: int = 0, seal: Seal | None = None, say: Say = print
    ) -> None:
        """``start`` is the round the run continues after, 0 for a new run.

        ``seal`` says what the file held then; one that holds something else is put aside, and said.
        """
        self.path = folder / FILE
        data = self.path.read_bytes() if start and self.path.is_file() else b""
        rounds, lost = sift(data)
        if seal is not None:
            data = data[: seal["bytes"]]
            if hashlib.sha256(data).hexdigest() == seal["sha256"]:
                rounds, lost = sift(data)
            elif self.path.is_file():
                aside = self.path.with_name(f"{FILE}.damaged")
                os.replace(self.path, aside)
                say(f"warning: {self.path} was damaged; it is kept as {aside.name} and begun anew")
                rounds, lost = [], []
        if lost:
            say(f"warning: {self.path} is damaged in line {lost[0]}; such lines are left out")
        kept = [m for m in rounds if m["round"] <= start]
        self.before = kept
        """Figures of the rounds before, when a run is continued."""
        if missing := start - sum(m["round"] > 0 for m in kept):
            say(f"warning: {self.path} lacks {missing} of the {start} rounds so far")
        head = "".join(json.dumps(m) + "\n" for m in kept).encode()
        with disk.whole(self.path) as file:
            file.write(head)
        self.file = self.path.open("a", encoding="utf-8", newline="\n")
        self.sum, self.size = hashlib.sha256(head), len(head)

    def write(self, figures: Mapping[str, Any]) -> None:
        """Append one round and flush it, so that a kill loses nothing that a checkpoint knows."""
        # JSON has no NaN: a figure that overflowed is null
        known = {k: v if _is_finite(v) else None for k, v in figures.items()}
        line = json.dumps(known) + "\n"  # ASCII alone
        self.file.write(line)
        self.file.flush()
        self.sum.update(line.encode())
        self.size += len(line)

    def sealed(self) -> Seal:
        """Length and digest of what is written."""
        return {"bytes": self.size, "sha256": self.sum.hexdigest()}

    def close(self) -> None:
        """No more rounds."""
        self.file.close()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
