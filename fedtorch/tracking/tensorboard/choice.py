"""TensorBoard as a run's options name it. Its messages take a while to import: they come as a run opens."""

from dataclasses import dataclass
from pathlib import Path

from fedtorch import disk
from fedtorch.tracking.base import Tracker, Tracking


@dataclass(frozen=True, kw_only=True)
class TensorBoard(Tracking):
    """Event files in the run folder, read by ``tensorboard --logdir``."""

    def open(self, folder: Path, start: int) -> Tracker:
        """Cuts away what an earlier start logged for rounds after ``start``."""
        from fedtorch.tracking.tensorboard.events import EventTracker, trim

        for path in folder.rglob(f"*tfevents*{disk.EVENTS}"):
            trim(path, start)
        return EventTracker(folder, self.compare)
