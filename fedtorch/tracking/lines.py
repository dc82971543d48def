"""``metrics.jsonl``: one JSON object a round, for programs and for ``History``."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


class Lines:
    """Appends a line a round; lines of later rounds than ``start`` are cut away first."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        """``start`` is the round the run continues after, 0 for a new run."""
        self.path = folder / NAME
        kept = [m for m in read(self.path) if m["round"] <= start] if start else []
        self.before = kept
        """Figures of the rounds before, when a run is continued."""
        part = self.path.with_name(NAME + ".part")
        part.write_text("".join(json.dumps(m) + "\n" for m in kept), encoding="utf-8")
        os.replace(part, self.path)
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, figures: Mapping[str, Any]) -> None:
        """Append one round and flush it, so that a kill loses nothing that a checkpoint knows."""
        # JSON has no NaN: a figure that overflowed is null
        known = {k: v if _finite(v) else None for k, v in figures.items()}
        self.file.write(json.dumps(known) + "\n")
        self.file.flush()

    def close(self) -> None:
        """No more rounds."""
        self.file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rounds of a file; the half line that a kill can leave at the end is no round."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
