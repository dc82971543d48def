"""A site's own privacy ledger: what its data has cost over all runs, and what it will not exceed.

Whatever the server says, a site charges itself before it trains, on its own disk, and says no when its
budget has no room. A visit that is done again, because the server lost it, is charged again.
"""

import json
import math
from pathlib import Path

from fedtorch import disk
from fedtorch.privacy import LocalDP, Privacy, SampleLevel
from fedtorch.privacy.ledger import UNITS, Ledger
from fedtorch.types import ConfigError


class OverBudget(Exception):
    """This site will not do what it was asked: its data would cost more than it allows."""


class Budget:
    """Ledgers of one site, one for each unit of privacy, and its limits."""

    def __init__(self, folder: Path, site: str, most: float | None, delta: float) -> None:
        """Read what earlier runs have spent; raises ConfigError when a ledger was tampered with."""
        self.folder, self.site, self.most, self.delta = folder, site, most, delta
        self.ledgers = {u: self._open(u) for u in UNITS if self._path(u).exists()}

    def admit(self, privacy: Privacy | None, insecure: bool) -> None:
        """Refuse a run whose noise this site could not vouch for; raises ConfigError."""
        if privacy is not None and privacy.insecure_seed is not None and not insecure:
            raise ConfigError("the run's noise comes from a known seed: this site will not join it")
        if self.most is None:
            return
        if not isinstance(privacy, (SampleLevel, LocalDP)):
            what = "no noise" if privacy is None else "noise that only the server adds"
            raise ConfigError(
                f"the run has {what}, but this site's max_epsilon asks for noise added here"
            )
        if privacy.delta > self.delta:
            raise ConfigError(
                f"the run's delta {privacy.delta:g} is above this site's {self.delta:g}"
            )

    def charge(self, privacy: Privacy | None, round: int, noise: float) -> None:
        """Enter a visit before any of its work is done; raises OverBudget, with nothing entered."""
        if privacy is None:
            return
        if not 0 < noise < math.inf:
            raise OverBudget(
                f"it was asked to train with noise multiplier {noise:g}, which hides nothing"
            )
        ledger = self.ledgers.get(privacy.unit) or self._open(privacy.unit)
        self.ledgers[privacy.unit] = ledger
        event = privacy.event(noise)
        if self.most is not None:
            others = sum(
                led.spent(self.delta) for led in self.ledgers.values() if led is not ledger
            )
            if not ledger.fits(event, [self.site], self.most - others, self.delta):
                raise OverBudget(f"it would cost this site more than epsilon {self.most:g} in all")
        ledger.charge(round, event, [self.site])
        self._note(privacy.unit, ledger)

    def spent(self, accountant: str = "prv") -> float:
        """Epsilon of this site's data over all runs; each unit's ledger at this site's delta, so that runs
        of both units together hold at twice that delta.
        """
        return sum(ledger.spent(self.delta, accountant) for ledger in self.ledgers.values())

    def _open(self, unit: str) -> Ledger:
        path = self._path(unit)
        if not path.exists():
            ledger = Ledger(path, unit)
            self._note(unit, ledger)
            return ledger
        try:
            saved = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise ConfigError(f"{path} is there, but not the note beside it: {e}") from e
        return Ledger.resume(path, saved)

    def _note(self, unit: str, ledger: Ledger) -> None:
        # how far the journal had come: a journal cut short later does not go unnoticed
        note = self._path(unit).with_suffix(".json")
        disk.replace(note, json.dumps(ledger.state_dict()) + "\n")

    def _path(self, unit: str) -> Path:
        return self.folder / f"ledger-{unit}.jsonl"
