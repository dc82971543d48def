"""Options of the record, and the interface of a tracker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedtorch.options import COUNT, NOT_NEGATIVE, check


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """What is recorded, and how often."""

    every: int | None = None
    """Rounds between two sets of pictures, histograms and projector points; none: pictures after the
    last round, the others four times in all."""
    pictures: bool = True
    """Maps of who holds what and who took part, confusion matrix, misclassified test images."""
    histograms: bool = True
    """Weights and updates of each layer, and the clients' validation scores."""
    graph: bool = True
    """The model's modules and how data flows through them."""
    projector: bool | None = None
    """Client updates as points, coloured by client; none: only where nothing is private."""
    client_runs: int = 0
    """Clients that get a run of their own, drawn at random (curves of single clients)."""

    compare: list[str] = field(default_factory=list)
    """Options that make the columns of the HParams page; none given: the usual ones."""

    def __post_init__(self) -> None:
        """Refuse what cannot be counted."""
        check(self, "tracking", every=COUNT, client_runs=NOT_NEGATIVE)

    def ready(self) -> None:
        """Raises ConfigError where a package that it needs is not installed."""

    def open(self, folder: Path, start: int) -> "Tracker":
        """Begin to record into ``folder``, or go on after round ``start``."""
        return Tracker()


class Tracker:
    """Takes what is recorded; a method that is not overridden lets it pass."""

    def config(self, table: Mapping[str, Any], metrics: Sequence[str], private: bool) -> None:
        """The run's options by dotted name, and the tags that runs are compared by."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one round by tag; a tag ``clients/client-ID/...`` is of that client's run."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """An image file."""

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Records a distribution of numbers."""

    def graph(self, nodes: Sequence[tuple[str, str, Sequence[str], str]]) -> None:
        """Modules as (name, type, names of where its input comes from, note)."""

    def points(self, tag: str, points: Tensor, rows: Sequence[Sequence[str]], step: int) -> None:
        """Points [N, D] with a row of words each; the first row of words is their heading."""

    def timeless(self) -> None:
        """Keep how long things take out of what is recorded from now on."""

    def finish(self) -> None:
        """The run came to its end."""

    def flush(self) -> None:
        """Let nothing be lost if the process is killed now."""

    def close(self) -> None:
        """Nothing more is coming."""
