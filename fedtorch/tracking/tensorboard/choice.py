"""TensorBoard as a run's options name it; its messages take a while to import."""

from dataclasses import dataclass
from pathlib import Path

from fedtorch import disk
from fedtorch.process import Unsearched
from fedtorch.tracking.base import Tracker, Tracking


@dataclass(frozen=True, kw_only=True)
class TensorBoard(Tracking):
    """Event files in the run folder, read by ``tensorboard --logdir``."""

    def ready(self) -> None:
        """Reads the messages, while no model is there yet."""
        with Unsearched():
            from fedtorch.tracking.tensorboard import events  # noqa: F401

    def open(self, folder: Path, start: int) -> Tracker:
        """Cuts away what an earlier start logged for rounds after ``start``."""
        from fedtorch.tracking.tensorboard.events import EventTracker, trim

        for path in folder.rglob(f"*tfevents*{disk.EVENTS}"):
            trim(path, start)
        return EventTracker(folder, self.compare)
