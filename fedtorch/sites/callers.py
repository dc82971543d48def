"""Which process speaks for a site: two of one name would do its visits in turn, each by its own data.

A process names itself by a number of its own, a new one each time it is started. One that was killed never
calls again. So when an earlier one calls after a later one has, both are alive, and the later one is turned
away. What calls by no number, an older version, is not looked at.
"""

import re
import secrets
import time
from collections.abc import Callable

PROCESS = re.compile(r"[0-9a-f]{16}")
MOST = 64
"""Processes of one site that are remembered, of each kind: one that is killed over and over makes many."""


def new_process() -> str:
    """What a process calls itself."""
    return secrets.token_hex(8)


class Callers:
    """The processes that have called as one site, the first first, and those that were turned away."""

    def __init__(self, silent: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Who is ``silent`` for so many seconds has ended, or lost its place."""
        self.silent, self.clock = silent, clock
        self.heard: dict[str, float] = {}
        self.away: dict[str, float] = {}

    def turned_away(self, process: object) -> bool:
        """Hear a call; whether it comes from a second process, beside one that is at work."""
        if not (isinstance(process, str) and PROCESS.fullmatch(process)):
            return False
        now = self.clock()
        if process in self.away:
            return True
        self.heard = {p: t for p, t in self.heard.items() if now - t < self.silent}
        order = [*self.heard]
        later = order[order.index(process) + 1 :] if process in self.heard else []
        for other in later:
            self.away[other] = self.heard.pop(other)
        self.heard[process] = now  # an assignment keeps its place
        for kept in (self.heard, self.away):
            for old in [*kept][:-MOST]:
                del kept[old]
        return False
