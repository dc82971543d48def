"""What a site remembers between visits, on its own disk.

The server may lose a visit (the report came late, or the server fell back to a checkpoint), and then the
visit never happened. So memory is kept by visit, and each task says which visit of this site was the last
that counted: that visit's memory is the one to go on from.
"""

import os
import pickle
from pathlib import Path

import torch

from fedtorch.types import Params

KEPT = 4
"""Visits whose memory is kept."""


class VisitMemory:
    """Memory groups by visit, newest last."""

    def __init__(self, folder: Path) -> None:
        """Read what an earlier process of this site has left."""
        self.path = folder / "memory.pt"
        self.visits: dict[str, dict[str, Params]] = {}
        if self.path.exists():
            try:
                # weights_only: nothing in a file can run code
                self.visits = torch.load(self.path, weights_only=True)["visits"]
            except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as e:
                raise ValueError(f"{self.path} cannot be read: {e}") from e

    def after(self, visit: str) -> dict[str, Params] | None:
        """Memory as it was after ``visit`` ("": before any); None when that is gone."""
        return {} if not visit else self.visits.get(visit)

    def keep(self, visit: str, memory: dict[str, Params]) -> None:
        """Remember what a visit left, before the server hears of it."""
        self.visits[visit] = memory
        for old in [*self.visits][:-KEPT]:
            del self.visits[old]
        part = self.path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save({"visits": self.visits}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)
