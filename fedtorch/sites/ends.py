"""When a server of sites has done its rounds, and why not if it ends before."""

import signal
import time

from fedtorch.run.console import StopSignal
from fedtorch.server import Server
from fedtorch.sites.engine import SitesSession
from fedtorch.sites.options import ServeConfig

ENDS = {
    "error": "it met an error, which its own log tells",
    "stopped": "somebody stopped it",
    "budget": "its privacy budget has no room for another round",
    "away": "too few sites were there",
    "still": "the model never moved",
}
"""Why a run ended before it was done, as sites are told: they are told of no other site."""


class EndedEarly(Exception):
    """Fewer rounds than were asked for, and all that was trained is saved; ``code`` is the exit code."""

    def __init__(self, code: int, why: str, reason: str) -> None:
        """Why, in a sentence, and which of ``ENDS`` that is."""
        super().__init__(why)
        self.code = code
        self.reason = reason


def enough(session: SitesSession, config: ServeConfig, stop: StopSignal) -> bool:
    """Wait for enough sites to start a round."""
    end = time.monotonic() + config.patience
    while not stop.asked and time.monotonic() < end:
        if len(session.wait_for_sites(1.0)) >= session.needed:
            return True
    return False


def early(
    server: Server, session: SitesSession, config: ServeConfig, stopped: int
) -> EndedEarly | None:
    """Why there are no more rounds, if there should be, or why there might as well have been none."""
    if server.round_number >= config.rounds or (server.stopped and not stopped):
        still = EndedEarly(1, "the model never moved, no report was ever used", "still")
        return None if server.moved() else still
    if stopped:
        by = f"stopped by {signal.Signals(stopped).name}"
        return EndedEarly(128 + stopped, by, "stopped")
    if not server.within_budget():
        return EndedEarly(3, "the privacy budget has no room for another", "budget")
    if session.asking and not session.asking.over and session.asking.wait(0):
        few = f"only {len(session.asking.sent)} of {config.minimum} sites sent statistics of their columns"
        return EndedEarly(1, few, "away")
    here = session.wait_for_sites(0)
    names = ", ".join(s for s in config.sites if s not in here)
    why = f"waited {config.patience:g} s for {session.needed} sites; away are {names}"
    return EndedEarly(1, why, "away")
