"""Weights & Biases, as the extra ``wandb``: options, curves, pictures and the summary."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtorch.tracking.base import Tracker, Tracking
from fedtorch.types import ConfigError

RUN = "wandb_run_id"
"""File in the run folder that names the run, so that a resumed run goes on in it."""


@dataclass(frozen=True, kw_only=True)
class WandB(Tracking):
    """A run in a Weights & Biases project."""

    project: str = "fedtorch"
    """Project the run belongs to."""
    mode: str = "online"
    """online, or offline: files in the run folder that ``wandb sync`` sends later."""

    def ready(self) -> None:
        """Raises ConfigError when the package is not installed."""
        try:
            import wandb  # noqa: F401
        except ImportError as e:
            raise ConfigError(
                "tracking wandb needs the package wandb: pip install 'fedtorch[wandb]'"
            ) from e

    def open(self, folder: Path, start: int) -> Tracker:
        """Raises ConfigError when the package is not installed or will not start."""
        self.ready()
        import wandb

        known = folder / RUN
        number = known.read_text(encoding="utf-8") if start and known.is_file() else None
        try:
            run = wandb.init(
                project=self.project,
                name=folder.name,
                dir=str(folder),
                id=number,
                resume="allow" if number else None,
                mode=self.mode,
            )
        except Exception as e:  # its own errors and the network's
            first = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise ConfigError(f"Weights & Biases cannot be used: {first}") from e
        known.write_text(str(run.id), encoding="utf-8")
        return WandBTracker(run, wandb.Image)


class WandBTracker(Tracker):
    """A round is one step; steps that a killed run already sent are refused by the service."""

    def __init__(self, run: Any, image: Any) -> None:
        """``run`` is what ``wandb.init`` gave, ``image`` its Image class."""
        self.run, self.image = run, image

    def config(self, table: Mapping[str, Any], metrics: Sequence[str], private: bool) -> None:
        """Options."""
        self.run.config.update(dict(table), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Curves."""
        self.run.log(dict(values), step=step)

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """Images."""
        from PIL import Image

        self.run.log({tag: self.image(Image.open(io.BytesIO(png)))}, step=step)

    def close(self) -> None:
        """The run is over."""
        self.run.finish()
