"""What a site remembers between visits, on its own disk.

The server may lose a visit (the report came late, or the server fell back to a checkpoint), and then the
visit never happened. So memory is kept by visit, and each task says which visit of this site was the last
that counted: that visit's memory is the one to go on from.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.run import checkpoint
from fedtorch.types import ConfigError, Params

FORMAT = "fedtorch site memory 1"

KEPT = 4
"""Newest visits whose memory is kept, beside the one that the server went on from."""


class VisitMemory:
    """Memory groups by visit, newest last."""

    def __init__(self, folder: Path) -> None:
        """Read what an earlier process of this site has left; raises ConfigError when it is damaged."""
        self.path = folder / "memory.pt"
        self.visits: dict[str, dict[str, Params]] = {}
        if self.path.exists():
            self.visits = checkpoint.read(self.path, FORMAT).get("visits", {})
            if not _sound(self.visits):
                raise ConfigError(f"{self.path} is damaged: it holds no memory by visit")

    def after(self, visit: str) -> dict[str, Params] | None:
        """Memory as it was after ``visit`` ("": before any); None when that is gone."""
        return {} if not visit else self.visits.get(visit)

    def keep(self, visit: str, memory: dict[str, Params], after: str = "") -> None:
        """Remember what a visit left, before the server hears of it; raises ConfigError if that fails.

        ``after``, the visit it went on from, stays: many late visits may follow it and none of them count.
        """
        self.visits.pop(visit, None)
        self.visits[visit] = memory
        for old in [*self.visits][:-KEPT]:
            if old != after:
                del self.visits[old]
        try:
            with disk.whole(self.path) as file:
                torch.save({"format": FORMAT, "visits": self.visits}, file)
        except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
            reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
            raise ConfigError(
                f"{self.path} cannot be written ({reason}): make room and start this site again; it is "
                "given the same visit, which is charged again"
            ) from e


def _sound(visits: Any) -> bool:
    """Whether it is visit -> group -> name -> tensor."""
    level = [visits]
    for _ in range(3):
        if not all(isinstance(v, dict) for v in level):
            return False
        level = [inner for v in level for inner in v.values()]
    return all(isinstance(v, Tensor) for v in level)
