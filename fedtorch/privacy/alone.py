"""The release alone: what a site of any framework puts between its update and the wire.

Nobody else's training changes. The update is clipped and noised by a plan of local privacy, and charged to
a ledger of the site's own before it leaves. Nobody is trusted, so the noise is large where sites are few.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.accounting.owned import note, opened, untouched
from fedtorch.privacy.base import Privacy
from fedtorch.privacy.local import LocalDP
from fedtorch.privacy.noise.streams import Stream
from fedtorch.privacy.sample import SampleLevel
from fedtorch.types import ConfigError, OverBudget

Numbers = TypeVar("Numbers", Tensor, np.ndarray)

PATIENCE = 30.0
"""Seconds that a charge waits for another process of the site to end its own."""


def release(update: Mapping[str, Numbers], plan: LocalDP, stream: Stream) -> dict[str, Numbers]:
    """The update as it may leave a site: clipped to ``plan.clip`` as one vector, then noised throughout.

    ``update`` has tensors or arrays of floats of any shapes, of what a client changed (its weights less
    those that it was sent); what comes back has their shapes, types and devices. An update with any number
    that is not finite is released as noise alone: that it failed is not told either. ``stream`` makes the
    noise, and must be a new one each time (``plan.stream("release", round)``). Nothing is charged here:
    ``Budget.release`` charges first.

    Guarantee: whatever the site's data was, two updates differ by 2 clip at most, and the noise multiplier
    of the plan is in units of that (``LocalDP``). Raises ConfigError where a part is not made of floats,
    which no noise would cover, or the plan does not say how much noise there is.
    """
    return _noised(update, _exact(update), hiding_all(plan), stream)


def hiding_all(plan: Privacy) -> LocalDP:
    """The plan, where it hides a site's whole data; raises ConfigError for others."""
    if type(plan) is not LocalDP:
        raise ConfigError(
            f"a release hides a site's whole data, by LocalDP, not {type(plan).__name__}: single examples "
            "are hidden in the training itself (fedtorch.sites.inside)"
        )
    return plan


def multiplier(plan: Privacy) -> float:
    """Noise multiplier of a plan that stands alone; raises ConfigError where it is not one that can."""
    if type(plan) not in (LocalDP, SampleLevel):
        raise ConfigError(
            "a site alone promises what its own noise keeps, by LocalDP or, where fedtorch trains, "
            f"SampleLevel, not {type(plan).__name__}: others need a server that is trusted, or other sites"
        )
    if plan.metrics_epsilon or plan.statistics_noise:
        raise ConfigError(
            "a site alone tells no figures: leave out metrics_epsilon and statistics_noise"
        )
    if plan.noise_multiplier is None and plan.rounds is None:
        raise ConfigError(
            "the plan does not say for how many rounds its epsilon is: give it rounds, or a "
            "noise_multiplier"
        )
    return plan.calibrated(plan.rounds or 1)


def limit(plan: Privacy, most: float | None) -> float:
    """Epsilon that may be spent; raises ConfigError where neither the plan nor ``most`` says how much."""
    most = plan.target if most is None else most
    if most is None or not 0 < most < math.inf:
        raise ConfigError(
            f"a budget needs the most that it may spend, above 0, got {most}: give most, or a plan with "
            "an epsilon"
        )
    return most


class Budget:
    """What a site's updates have cost over all runs, in its own folder, and the most that they may."""

    def __init__(
        self,
        folder: Path | str,
        plan: Privacy,
        *,
        site: str = "site",
        most: float | None = None,
    ) -> None:
        """Read what was spent, in ``folder``, which is made where there is none.

        ``plan`` says how much is charged each time, and by its epsilon how much there is in all; ``most``
        is another limit, and must be given where the plan has a noise multiplier in place of an epsilon.
        Plans of both kinds have a ledger each, and what one has spent the other lacks.
        Raises ConfigError where there is no limit, or the ledger was damaged or is another site's.
        """
        self.folder, self.plan, self.site = Path(folder), plan, site
        self.event = plan.event(multiplier(plan))
        self.most = limit(plan, most)
        self.path = self.folder / f"ledger-{plan.unit}.jsonl"
        for unit, path in self._kept():
            opened(path, unit, site)

    @property
    def spent(self) -> float:
        """Epsilon of all that was charged here, at the plan's delta; of plans of both kinds, the sum.

        Each of two then has half of the delta, so that the sum holds at the whole of it.
        """
        return sum(self._priced(Ledger.look(path)) for _, path in self._kept())

    def charge(self, round: int) -> float:
        """Enter one release, of which nothing may have left yet; when this returns it is on disk.

        Gives the epsilon of all with it. Raises OverBudget, with nothing entered, where that is above
        ``most``; ConfigError where the ledger cannot be written. Several processes of a site may charge:
        each waits for the others.
        """
        return self.entered(round)[0]

    def entered(self, round: int) -> tuple[float, int]:
        """What ``charge`` gives, and the number of the entry, which no other release has."""
        with self._held():
            ledger = opened(self.path, self.plan.unit, self.site)
            others = sum(self._priced(Ledger.look(p)) for _, p in self._kept() if p != self.path)
            if not self._has_room(ledger, others):
                cost = others + ledger.would_spend([self.event], [self.site], *self._terms)
                so_far = others + self._priced(ledger)
                raise OverBudget(
                    f"round {round}: {self.site} would have spent epsilon {cost:.4f} in all, more than "
                    f"its {self.most:g}; so far it is {so_far:.4f}, and no more leaves it"
                )
            ledger.charge(round, self.event, [self.site])
            note(self.path, ledger, self.site)
            return others + self._priced(ledger), len(ledger)

    def release(self, update: Mapping[str, Numbers], round: int) -> dict[str, Numbers]:
        """Charge, then clip and noise (``release``, which says what comes back and what is refused).

        What is refused is not charged; what is charged stays charged.
        """
        plan, exact = hiding_all(self.plan), _exact(update)
        number = self.entered(round)[1]
        return _noised(update, exact, plan, plan.stream("release", self.site, round, number))

    @property
    def _terms(self) -> tuple[float, str]:
        kinds = {self.path, *(path for _, path in self._kept())}
        return self.plan.delta / len(kinds), self.plan.accountant

    def _priced(self, ledger: Ledger) -> float:
        return ledger.spent(*self._terms)

    def _kept(self) -> list[tuple[str, Path]]:
        """Ledgers here in which something was charged, and their units."""
        found = [(u, self.folder / f"ledger-{u}.jsonl") for u in ("example", "client")]
        return [(unit, path) for unit, path in found if not untouched(path)]

    def _has_room(self, ledger: Ledger, others: float) -> bool:
        plan, noise = self.plan, self.event.noise
        if plan.rounds and not others and plan.planned(noise, plan.rounds) <= self.most:
            # the last planned round must not fail by a rounding of the accountant
            whole = plan.whole(noise, plan.rounds, None)
            if ledger.within(whole, [self.event], [self.site]):
                return True
        return ledger.fits([self.event], [self.site], self.most - others, *self._terms)

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = disk.regular(self.folder / disk.LOCK).open("ab")
        except OSError as e:
            raise ConfigError(f"budget folder {self.folder} cannot be written: {e.strerror}") from e
        with file, ExitStack() as stack:
            try:
                stack.enter_context(disk.held(file, PATIENCE))
            except (BlockingIOError, PermissionError) as e:
                raise ConfigError(
                    f"budget folder {self.folder} is held by another process for {PATIENCE:g} s"
                ) from e
            yield


def _exact(update: Mapping[str, Numbers]) -> dict[str, Tensor]:
    if not update:
        raise ConfigError("the update is empty: there is nothing to release")
    return {name: _floats(name, v)[None] for name, v in update.items()}


def _noised(
    update: Mapping[str, Numbers], exact: dict[str, Tensor], plan: LocalDP, stream: Stream
) -> dict[str, Numbers]:
    sent = plan.noised({"delta": exact}, plan.clip, multiplier(plan), [stream])["delta"]
    return {name: alike(sent[name][0], v) for name, v in update.items()}


def _floats(name: str, value: Tensor | np.ndarray) -> Tensor:
    v = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    if not v.is_floating_point():
        raise ConfigError(
            f"{name} is made of {v.dtype}, which no noise covers: leave it out of the update"
        )
    return v.detach().double()


def alike(value: Tensor, old: Numbers) -> Numbers:
    """Of the kind, type and device of ``old``."""
    if isinstance(old, Tensor):
        return value.to(old.device, old.dtype)
    return value.numpy().astype(np.asarray(old).dtype)
