"""The record of a run: TensorBoard events and one JSON line a round."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fedtorch.figures import partition_figure

TAGS = {
    "train_loss": "train/loss",
    "update_norm": "train/update_norm",
    "lr": "train/lr",
    "clients": "clients/reported",
    "dropped": "clients/dropped",
    "nonfinite": "clients/nonfinite",
    "examples": "clients/examples",
    "seconds_train": "time/train_seconds",
    "seconds_aggregate": "time/aggregate_seconds",
    "seconds_evaluate": "time/evaluate_seconds",
}
"""Figure of a round -> TensorBoard tag; ``test_*`` and ``validation_*`` go under those words."""


class Tracker:
    """Writes each round to ``folder``; everything of later rounds than ``start`` is cut away first."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        """``start`` is the round the run continues after, 0 for a new run."""
        self.folder = folder
        trim(folder, start)
        self.writer = SummaryWriter(str(folder))
        self.lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def round(self, metrics: Mapping[str, Any]) -> None:
        """Log one round's figures and flush, so that a kill loses nothing that was saved."""
        step = int(metrics["round"])
        kinds = list(metrics.get("failed", {}).values())
        figures = dict(metrics) | {k: kinds.count(k) for k in ("dropped", "nonfinite")}
        for name, value in figures.items():
            tag = TAGS.get(name) or _section(name)
            if tag and isinstance(value, (int, float)):
                self.writer.add_scalar(tag, value, step)
        self.writer.flush()
        self.lines.write(json.dumps(metrics) + "\n")
        self.lines.flush()

    def text(self, tag: str, text: str) -> None:
        """A text panel, once a run."""
        self.writer.add_text(tag, text, 0)

    def partition(self, ids: Sequence[str], parts: Sequence[Tensor], labels: Tensor | None) -> None:
        """Who got what, as a picture."""
        self.writer.add_figure("data/partition", partition_figure(ids, parts, labels), 0)

    def __enter__(self) -> "Tracker":
        """Use as a context manager, so that files are closed whatever happens."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close both files."""
        self.writer.close()
        self.lines.close()


def _section(name: str) -> str | None:
    for section in ("test", "validation", "privacy", "nonprivate"):
        if name.startswith(f"{section}_"):
            return f"{section}/{name.removeprefix(f'{section}_')}"
    return None


def trim(folder: Path, start: int) -> None:
    """Drop what was logged for rounds after ``start``: a resumed run logs them again.

    TensorBoard only hides doubled steps; cutting the files keeps every reader right.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in folder.glob("events.out.tfevents.*"):
        if path.name.endswith(".part") or start == 0:  # round 0 describes the run once more
            path.unlink()
            continue
        raw = list(RawEventFileLoader(str(path)).Load())
        kept = [r for r in raw if Event.FromString(r).step <= start]
        if len(kept) < len(raw):
            part = path.with_name(path.name + ".part")
            with part.open("wb") as file:
                writer = RecordWriter(file)
                for record in kept:
                    writer.write(record)
                writer.flush()
            os.replace(part, path)
    lines = folder / "metrics.jsonl"
    if lines.exists():
        kept_lines = []
        for line in lines.read_text(encoding="utf-8").splitlines(keepends=True):
            # a kill can leave half a line: that round is trained again
            if line.endswith("\n") and json.loads(line)["round"] <= start:
                kept_lines.append(line)
        part = lines.with_name("metrics.jsonl.part")
        part.write_text("".join(kept_lines), encoding="utf-8")
        os.replace(part, lines)
