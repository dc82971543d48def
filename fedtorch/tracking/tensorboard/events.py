"""What is recorded becomes event files in the run folder, which TensorBoard reads."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedtorch import disk
from fedtorch.tracking.base import Tracker
from fedtorch.tracking.tags import custom_scalars, purpose
from fedtorch.tracking.tensorboard import protos
from fedtorch.tracking.tensorboard.protos import EventFile

PLACES = {"run_dir", "resume", "trust_code"}
"""Options that say where a run is, and differ for that reason alone."""
CLIENTS = "clients/client-"
"""Tags that start like this go into the run of that client."""


class EventTracker(Tracker):
    """One event file for the run, and one for each client that has a run of its own."""

    def __init__(self, folder: Path, compare: Sequence[str]) -> None:
        """Opens the run's file at once, so that a folder that cannot be written shows now."""
        self.folder, self.compare = folder, compare
        self.clock: Callable[[], float] = time.time
        self.known: dict[str, set[str]] = {}
        """Curves of each run that have begun, whose purpose is written."""
        self.files = {"": EventFile(folder, disk.EVENTS)}

    def config(self, table: Mapping[str, Any], metrics: Sequence[str], private: bool) -> None:
        """Hyperparameters and the Custom Scalars pages."""
        pages = custom_scalars(private)
        values = {k: _plain(v) for k, v in table.items() if k not in PLACES}
        # a sweep says which columns there are; else TensorBoard puts those first in which runs differ
        if self.compare:
            columns = {k: values.get(k, "") for k in self.compare}
            # parallel coordinates leave out runs without a value: no column that only some could fill
            private = private or any(c.startswith("privacy") for c in self.compare)
            ends = [*metrics[::-1], *(["privacy/epsilon"] if private else ["train/loss"])]
            self.files[""].write(protos.experiment(columns, [*ends, "time/elapsed"]), 0)
        for proto in (protos.session(values), protos.pages(pages)):
            self.files[""].write(proto, 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """All of a round in one record."""
        runs: dict[str, dict[str, float]] = {}
        for tag, value in values.items():
            run, _, rest = tag.removeprefix("clients/").partition("/")
            run, rest = (f"clients/{run}", rest) if tag.startswith(CLIENTS) else ("", tag)
            runs.setdefault(run, {})[rest] = value
        for run, own in runs.items():
            if run not in self.files:
                self.files[run] = EventFile(self.folder / run, disk.EVENTS)
            new = own.keys() - self.known.setdefault(run, set())
            self.known[run] |= new
            self.files[run].write(protos.scalars(own, {tag: purpose(tag) for tag in new}), step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Under Text."""
        self.files[""].write(protos.text(tag, text), step)

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """Under Images."""
        self.files[""].write(protos.image(tag, png), step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Under Histograms and Distributions."""
        self.files[""].write(protos.histogram(tag, values), step)

    def graph(self, nodes: Sequence[tuple[str, str, Sequence[str], str]]) -> None:
        """Under Graphs."""
        self.files[""].event(graph_def=protos.graph(nodes))

    def points(self, tag: str, points: Tensor, rows: Sequence[Sequence[str]], step: int) -> None:
        """Under Projector: two tables and a line in its config; the newest step of a tag stays."""
        folder = self.folder / "projector"
        folder.mkdir(exist_ok=True)
        lines = ["\t".join(map(str, p)) for p in points.double().round(decimals=6).tolist()]
        words = ["\t".join(w.replace("\t", " ").replace("\n", " ") for w in r) for r in rows]
        for name, text in ((f"{tag}.tsv", lines), (f"{tag}-labels.tsv", words)):
            (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")
        (self.folder / "projector_config.pbtxt").write_text(
            f'embeddings {{\n  tensor_name: "{tag}"\n  tensor_path: "projector/{tag}.tsv"\n'
            f'  metadata_path: "projector/{tag}-labels.tsv"\n}}\n',
            encoding="utf-8",
        )

    def timeless(self) -> None:
        """Stamps everything with the present time."""
        now = time.time()
        self.clock = self.files[""].clock = lambda: now

    def finish(self) -> None:
        """Mark the run as done in the HParams table."""
        self.files[""].write(protos.session_end(self.clock()), 0)

    def flush(self) -> None:
        """Hand everything to the system."""
        for file in self.files.values():
            file.file.flush()

    def close(self) -> None:
        """Close every file."""
        for file in self.files.values():
            file.close()


def trim(path: Path, start: int) -> None:
    """Drop what was logged for rounds after ``start``: a resumed run logs them again.

    TensorBoard only hides doubled steps; cutting the files keeps every reader right. What a run writes
    whenever it starts (hyperparameters, pages, graph) goes too.
    """
    if not start:
        path.unlink()
        return
    read = 0
    with disk.whole(path) as file:
        for record, event in protos.events(path):
            read += len(record)
            again = event.WhichOneof("what") == "graph_def" or any(
                v.tag.startswith("_hparams_") or v.tag == "custom_scalars__config__"
                for v in event.summary.value
            )
            if event.step <= start and not again:
                file.write(record)
        if read < max(path.stat().st_size, 1):
            print(f"warning: {path} is cut short or damaged at byte {read}; the rest is left out")


def _plain(value: Any) -> float | str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, (int, float, str)) else str(value)
