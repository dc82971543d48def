"""What long measurements have found so far, a line a run, so that one that was stopped goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path("build/measured")
"""Delete it after a change of what is measured."""


def once(of: str, key: list[Any], measure: Callable[[], Any]) -> Any:
    """What the benchmark ``of`` measured under this key, before or now; as JSON has it."""
    file = FOLDER / f"{of}.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        known, found = json.loads(line)
        if known == key:
            return found
    found = measure()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps([key, found]) + "\n")
    return found
