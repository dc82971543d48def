"""A process that is up beside others and takes its turn when asked."""

import os
import subprocess
import sys
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

ANSWER = "answer "
"""What a line that is meant for us begins with: others may talk too."""


class Side:
    """One process of one thread, which answers a first time by itself, then each line that it is sent."""

    def __init__(self, folder: Path, *command: str) -> None:
        """``command``: Python's arguments."""
        given = ONE_THREAD | {"PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            cwd=folder, env=os.environ | given, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.first = self.answer()

    def answer(self) -> str:
        """Its next word; raises SystemExit where the process has ended."""
        for line in self.process.stdout or ():
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER)
        raise SystemExit(f"{self.process.args[-3:]} ended: status {self.process.wait()}")  # type: ignore[index]

    def ask(self, what: object) -> str:
        """Its answer to this."""
        self.tell(what)
        return self.answer()

    def tell(self, what: object) -> None:
        """Ask, and hear the answer later."""
        print(what, file=self.process.stdin, flush=True)

    def end(self) -> None:
        """Nothing is asked any more."""
        self.process.communicate()
