"""A site's own privacy ledger: what its data has cost over all runs, and what it will not exceed.

Whatever the server says, a site charges itself before it trains, on its own disk, and says no when its
budget has no room. A visit that is done again, because the server lost it, is charged again.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedtorch.checks import combination
from fedtorch.privacy import Privacy
from fedtorch.privacy.accounting.events import Event
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.accounting.owned import note, opened
from fedtorch.privacy.run import BEFORE
from fedtorch.recipe import Recipe
from fedtorch.types import ConfigError, OverBudget

BOOKS = {"example": "example", "client": "client", "presence": "client"}
"""Ledgers and their units. What one row costs is in the first two: a row more or less, and any data in
place of any other. In the third is what it costs that this site is there at all, of which no row's cost
follows: epsilons over different neighbours do not add up."""


def book(privacy: Privacy) -> str:
    """Which ledger a plan is charged to."""
    return "presence" if privacy.central or privacy.masked else privacy.unit


class SiteLedgers:
    """Ledgers of one site, one for each unit of privacy and neighbouring relation, and its limits."""

    def __init__(self, folder: Path, site: str, most: float | None, delta: float) -> None:
        """Read what earlier runs have spent; raises ConfigError when a ledger was tampered with."""
        self.folder, self.site, self.most, self.delta = folder, site, most, delta
        kept = [
            u for u in BOOKS for s in (".jsonl", ".json") if self._path(u).with_suffix(s).exists()
        ]
        self.ledgers = {u: self._open(u) for u in dict.fromkeys(kept)}

    def admit(self, recipe: Recipe, insecure: bool, derived: bool, masks: bool = False) -> None:
        """Refuse a run whose privacy this site could not vouch for; raises ConfigError.

        The checks are those of a server: what it would refuse, a site refuses too. ``derived`` says
        whether this site's examples were scaled, or filled, by numbers of their own; ``masks``, whether it
        takes part under masks alone (require_secure).
        """
        privacy = recipe.privacy
        if privacy.claims:
            _check(recipe, privacy, insecure, derived)
        if self.most is None:
            return
        if not privacy.per_client:
            what = "noise that only the server adds" if privacy.central else "no noise"
            raise ConfigError(
                f"the run has {what}, but this site's max_epsilon asks for noise added here"
            )
        if privacy.masked and not masks:
            raise ConfigError(
                "this site would add a share of the noise, which is enough under masks alone, and with "
                "max_epsilon it must be sure of them: set require_secure = true"
            )
        if privacy.delta > self.delta:
            raise ConfigError(
                f"the run's delta {privacy.delta:g} is above this site's {self.delta:g}"
            )

    def told(self, recipe: Recipe) -> Recipe:
        """The recipe by which this site trains: with a budget, nothing leaves that no noise covers."""
        if self.most is None or not recipe.privacy.claims:
            return recipe
        return replace(recipe, privacy=replace(recipe.privacy, strict=True))

    def charge(
        self, privacy: Privacy | None, round: int, noise: float, figures: float | None = None
    ) -> None:
        """Enter a visit before any of its work is done; raises OverBudget, with nothing entered.

        ``figures``: noise multiplier of those that it is to tell inside the budget.
        """
        if privacy is None:
            return
        if not 0 < noise < math.inf:
            raise OverBudget(
                f"it was asked to train with noise multiplier {noise:g}, which hides nothing"
            )
        if figures is not None and not 0 < figures < math.inf:
            raise OverBudget(
                f"it was asked for figures with noise multiplier {figures:g}, which hides nothing"
            )
        apart = () if figures is None else privacy.apart(figures)
        self._enter(privacy, round, [privacy.event(noise), *apart])

    def charge_once(self, privacy: Privacy) -> None:
        """The same for what a plan releases once, before the first round."""
        for event in privacy.once:
            self._enter(privacy, BEFORE, [event])

    def _enter(self, privacy: Privacy, round: int, events: Sequence[Event]) -> None:
        name = book(privacy)
        ledger = self.ledgers[name] = self.ledgers.get(name) or self._open(name)
        if self.most is not None:
            others = sum(
                self.ledgers[b].spent(self.delta)
                for b in ("example", "client")
                if b in self.ledgers and b != name and name != "presence"
            )
            if not ledger.fits(events, [self.site], self.most - others, self.delta):
                cost = others + ledger.would_spend(events, [self.site], self.delta)
                raise OverBudget(
                    f"this site's data would have cost epsilon {cost:.4f} in all, more than its "
                    f"max_epsilon {self.most:g}; so far it is {self.spent():.4f}"
                )
        for event in events:
            ledger.charge(round, event, [self.site])
        note(self._path(name), ledger, self.site)

    def spent(self, accountant: str = "prv") -> float:
        """Epsilon of this site's rows over all runs; each unit's ledger at this site's delta, so that runs
        of both units together hold at twice that delta. Where it is larger, that of the site's presence.
        """
        by = {b: led.spent(self.delta, accountant) for b, led in self.ledgers.items()}
        return max(by.get("example", 0.0) + by.get("client", 0.0), by.get("presence", 0.0))

    def _open(self, unit: str) -> Ledger:
        return opened(self._path(unit), BOOKS[unit], self.site)

    def _path(self, unit: str) -> Path:
        return self.folder / f"ledger-{unit}.jsonl"


def _check(recipe: Recipe, privacy: Privacy, insecure: bool, derived: bool) -> None:
    if privacy.insecure_seed is not None and not insecure:
        raise ConfigError("the run's noise comes from a known seed: this site will not join it")
    if privacy.rounds is None:
        raise ConfigError("the run's plan does not say for how many rounds its noise is")
    combination.check(recipe)
    if not privacy.central:  # its other checks are about the cohort
        privacy.check(1, privacy.calibrated(privacy.rounds))
    if derived and privacy.unit == "example":
        raise ConfigError(
            "dataset.standardize, or a mean or median in place of missing values, voids the privacy claim: "
            "every example moves what all are prepared by, and nobody noises it; give public numbers, by "
            "dataset.bounds and dataset.fill"
        )
