"""Which sums a site has let be opened, on its own disk, and which it will not let be opened beside them.

Two sums of one round that differ by one site differ by that site's update. A server that crashed may do a
round again, so a site keeps (run, round, survivors) of every list that it signed, and signs another of the
same round only where the two together show no single update.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from fedtorch import disk
from fedtorch.types import ConfigError

APART = 3
"""So many sites must two lists of a round differ by; and it may happen once."""
ENCRYPTED = "\nencrypted"
"""After a run's name: who was to open its encrypted sums."""
Entry = tuple[int, frozenset[str]]
"""Round and survivors."""


class Openings:
    """Lists of survivors that were signed, by run; one line a list, appended and never changed."""

    def __init__(self, folder: Path, begun: bool = False) -> None:
        """Read what earlier processes of this site have signed; raises ConfigError when it is damaged.

        ``begun``: there must be a file, for this site has been in a secure round.
        """
        self.path = folder / "openings.jsonl"
        if begun and not self.path.exists():
            raise ConfigError(
                f"{self.path}, which keeps whose sums this site has let be opened, is gone: put the state "
                "folder back as it was, or give --lost-state true if it is gone for good"
            )
        self.runs: dict[str, list[Entry]] = {}
        try:
            if not self.path.exists():
                self.path.touch()
                disk.sync_folder(folder)
            data = disk.regular(self.path).read_bytes()
            # a last line without an end was never signed: its process died while it wrote
            self.end = data.rfind(b"\n") + 1
            for run, round, names in map(json.loads, data[: self.end].splitlines()):
                if type(round) is not int or not isinstance(names, list):
                    raise ValueError("a line is no opening")
                self._remember(run, round, names)
        except (OSError, ValueError, TypeError, RecursionError) as e:
            raise ConfigError(
                f"{self.path}, which keeps whose sums this site has let be opened, cannot be used ({e}): "
                "put the state folder back as it was"
            ) from e

    def refusal(self, run: str, round: int, names: Sequence[str], noised: bool) -> str | None:
        """Why the sum of these may not be opened in this round, in a sentence; None where it may.

        ``noised``: every opening is charged noise of its own, made at this site, so that none needs to
        be kept from another.
        """
        known, asked = self.runs.get(run, []), frozenset(names)
        before = [who for number, who in known if number == round]
        if noised or asked in before:
            return None
        if not before:
            newest = max((number for number, _ in known), default=-1)
            if round > newest:
                return None
            return (
                f"round {round + 1} was passed over: the run is at round {newest + 1} for this site"
            )
        differ = min(len(asked ^ who) for who in before)
        if len({*before}) > 1 or differ < APART:
            return (
                f"a sum of round {round + 1} was opened before, and the lists of sites differ by {differ}: "
                "what so few of them sent would show"
            )
        return None

    def passed_on(self, run: str, round: int, opener: str, noised: bool) -> str | None:
        """Why an encrypted update may not be sent for this site to open its sum; None where it may.

        Who opens keeps the lists of the sums that it opened, so a round has one opener however often it is
        done again.
        """
        why = self.refusal(run + ENCRYPTED, round, [opener], noised)
        before = [who for number, who in self.runs.get(run + ENCRYPTED, []) if number == round]
        if why and before:
            (known,) = before[0]
            return f"round {round + 1} is done again, and {known} was to open its sum, not {opener}"
        return why

    def pass_on(self, run: str, round: int, opener: str) -> None:
        """Enter who is to open the sum that this site's encrypted update will be in."""
        self.keep(run + ENCRYPTED, round, [opener])

    def keep(self, run: str, round: int, names: Sequence[str]) -> None:
        """Enter a list before it is signed; on disk when this returns, or raises ConfigError."""
        if (round, frozenset(names)) in self.runs.get(run, []):
            return
        line = (json.dumps([run, round, sorted(names)]) + "\n").encode()
        try:
            with self.path.open("ab") as file:
                file.truncate(self.end)  # what was left of a line of a process that died
                file.seek(0, os.SEEK_END)
                file.write(line)
                disk.sync(file)
        except OSError as e:
            raise ConfigError(f"{self.path} cannot be written: {e.strerror}") from e
        self.end += len(line)
        self._remember(run, round, names)

    def _remember(self, run: str, round: int, names: Sequence[str]) -> None:
        self.runs.setdefault(run, []).append((round, frozenset(names)))
