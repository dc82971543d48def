"""A site's own TensorBoard."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("fedtorch.site")


class Curves:
    """Curves in a folder; what cannot be written is said once, and the work goes on."""

    def __init__(self, folder: Path) -> None:
        """Files are made with the first figures."""
        self.folder = folder
        self.writer: SummaryWriter | None = None
        self.broken = False

    def draw(self, figures: Mapping[str, float], step: int) -> None:
        """One point on each curve."""
        if self.broken:
            return
        try:
            self.writer = self.writer or SummaryWriter(str(self.folder))
            for tag, value in figures.items():
                self.writer.add_scalar(tag, value, step)
            self.writer.flush()
        except OSError as e:
            self.broken = True
            log.warning(
                "curves cannot be written to %s (%s): none from here on", self.folder, e.strerror
            )

    def close(self) -> None:
        """Close the files."""
        with suppress(OSError):  # a full disk again; it has been said
            if self.writer is not None:
                self.writer.close()
