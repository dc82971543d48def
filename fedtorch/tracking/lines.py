"""``metrics.jsonl``: one JSON object a round, for programs and for ``History``."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.types import ConfigError

NAME = "metrics.jsonl"

Seal = Mapping[str, Any]
"""The file at a checkpoint: ``bytes`` and their ``sha256``."""

Say = Callable[[str], None]


class Lines:
    """Appends a line a round; what a killed run wrote after its checkpoint is cut away first."""

    def __init__(
        self, folder: Path, start: int = 0, seal: Seal | None = None, say: Say = print
    ) -> None:
        """``start`` is the round the run continues after, 0 for a new run.

        ``seal`` says what the file held then; one that holds something else is put aside, and said.
        """
        self.path = folder / NAME
        data = self.path.read_bytes() if start and self.path.is_file() else b""
        rounds, lost = sift(data)
        if seal is not None:
            data = data[: seal["bytes"]]
            if hashlib.sha256(data).hexdigest() == seal["sha256"]:
                rounds, lost = sift(data)
            elif self.path.is_file():
                aside = self.path.with_name(f"{NAME}.damaged")
                os.replace(self.path, aside)
                say(f"warning: {self.path} was damaged; it is kept as {aside.name} and begun anew")
                rounds, lost = [], []
        if lost:
            say(f"warning: {self.path} is damaged in line {lost[0]}; such lines are left out")
        kept = [m for m in rounds if m["round"] <= start]
        self.before = kept
        """Figures of the rounds before, when a run is continued."""
        if missing := start - sum(m["round"] > 0 for m in kept):
            say(f"warning: {self.path} lacks {missing} of the {start} rounds so far")
        head = "".join(json.dumps(m) + "\n" for m in kept).encode()
        with disk.whole(self.path) as file:
            file.write(head)
        self.file = self.path.open("a", encoding="utf-8", newline="\n")
        self.sum, self.size = hashlib.sha256(head), len(head)

    def write(self, figures: Mapping[str, Any]) -> None:
        """Append one round and flush it, so that a kill loses nothing that a checkpoint knows."""
        # JSON has no NaN: a figure that overflowed is null
        known = {k: v if _finite(v) else None for k, v in figures.items()}
        line = json.dumps(known) + "\n"  # ASCII alone
        self.file.write(line)
        self.file.flush()
        self.sum.update(line.encode())
        self.size += len(line)

    def seal(self) -> Seal:
        """Length and digest of what is written, which is on disk when this returns."""
        disk.sync(self.file)
        return {"bytes": self.size, "sha256": self.sum.hexdigest()}

    def close(self) -> None:
        """No more rounds."""
        self.file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rounds of a file; raises ConfigError naming a damaged line.

    The half line that a kill can leave at the end is no round.
    """
    rounds, lost = sift(path.read_bytes()) if path.is_file() else ([], [])
    if lost:
        raise ConfigError(
            f"{path} is damaged in line {lost[0]}: delete that line to see the others"
        )
    return rounds


def sift(data: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The rounds in a file's whole lines, and the numbers of the lines that hold none."""
    rounds, lost = [], []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            figures = json.loads(line)
            rounds.append(figures | {"round": int(figures["round"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            lost.append(number)
    return rounds, lost


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
