"""Privacy of one run at the server: the calibrated plan, its state, and the ledger it is charged to."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedtorch.privacy import told
from fedtorch.privacy.accounting.events import Event
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.base import Privacy
from fedtorch.privacy.nothing import DISAGREE, OpenRun
from fedtorch.types import TOLD, ConfigError, Params, Task

BEFORE = -1
"""Round that the ledger names for what is released before round 0."""

PUBLIC = frozenset(
    (
        "round",
        "lr",
        "step_norm",
        "privacy_epsilon",
        "privacy_epsilon_planned",
        "privacy_noise_multiplier",
        "privacy_noise_std",
        "privacy_clip_norm",
        "noised_loss",
        "noised_accuracy",
        "noised_count",
        "noised_error",
    )
)
"""Figures that no client's data reaches but through what the guarantee covers, each by its name."""

COVERED = {
    "example": frozenset(
        (
            *("cohort", "failed", "clients", "dropped", "update_norm", "bytes_down", "bytes_up"),
            *("left_out", "far", "too_few", "liars", "clamped"),
            *("secure_bytes_down", "secure_client_seconds", "secure_server_seconds"),
        )
    ),
    "client": frozenset[str](),
}
"""More of them: under sample-level privacy who takes part is no secret and updates are noised."""

TIMES = frozenset(
    f"seconds_{what}" for what in ("sample", "train", "aggregate", "evaluate", "log", "elapsed")
)
"""How long things took depends on who was there and with how much data: nobody's to know, if strict."""

SPEED = {"example": frozenset(("clients_per_second",)), "client": frozenset[str]()}
"""The same of how fast clients were, where how many they are is public."""


def mark(plan: Privacy, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by name, what the guarantee does not cover marked so; under ``strict`` it is left out."""
    level = "example" if plan.per_client else "client"
    public = PUBLIC | COVERED[level]
    if plan.strict:
        return {k: v for k, v in figures.items() if k in public}
    public |= TIMES | SPEED[level]
    return {k if k in public else f"nonprivate_{k}": v for k, v in figures.items()}


class BudgetSpent(RuntimeError):
    """The next round would spend more than the plan's epsilon; the model so far stands."""


class PrivateRun:
    """Calibrates once, charges before anything is released, noises what the server must noise."""

    def __init__(self, plan: Privacy, ids: Sequence[str], groups: dict[str, Params]) -> None:
        """``groups`` has the shapes of what a client sends."""
        if plan.rounds is None:
            raise ConfigError(
                "privacy.rounds must say how many rounds are planned: the noise depends on it"
            )
        self.plan = plan
        self.ids = list(ids)
        self.rounds = plan.rounds
        self.noise = plan.calibrated(plan.rounds)
        self.metrics_noise = told.figures_noise(plan, plan.rounds)
        """Noise multiplier of figures inside the budget; None where there are none."""
        self.size = sum(v.numel() for p in groups.values() for v in p.values())
        self.state = plan.start(groups)
        self._found: tuple[Any, tuple[Event, ...], float] | None = None
        self.keep(Ledger(unit=plan.unit))

    def keep(self, ledger: Ledger) -> None:
        """Charge to this ledger, a new one, from now on: first what is released before round 0."""
        self.ledger = ledger
        for event in self.plan.once:
            ledger.charge(BEFORE, event)

    def check(self) -> list[str]:
        """Refuse what would void the claim; notes for the person who starts the run."""
        plan = self.plan
        notes = plan.check(len(self.ids), self.noise)
        share = plan.share()
        if share is not None and share * len(self.ids) < (least := self.noise * self.size**0.5):
            notes.append(
                f"noise outweighs every update: {share * len(self.ids):.0f} clients a round are expected, "
                f"and {self.size:,} weights at noise multiplier {self.noise:.3g} need about {least:,.0f}; "
                "take more clients, a smaller model or sample-level privacy"
            )
        if plan.unit == "client" and plan.delta * len(self.ids) > 1:
            notes.append(
                f"delta {plan.delta:g} lets one in {1 / plan.delta:,.0f} clients be exposed, and there are "
                f"{len(self.ids):,}: take a delta well below one over the number of clients"
            )
        if plan.insecure_seed is not None:
            notes.append("INSECURE: the noise comes from a known seed; this run protects nobody")
        return notes

    def affordable(self, asked: Sequence[Sequence[int]], round: int) -> bool:
        """Whether the target epsilon, or without one the plan's rounds, have room for this round.

        ``asked``: indices of clients, and once more of those that are asked again.
        """
        return all(self._room(who, round, n) for n, who in enumerate(asked, 1))

    def _room(self, cohort: Sequence[int], round: int, times: int) -> bool:
        """Whether there is room for these, each asked so many times."""
        plan = self.plan
        if plan.target is None:  # no budget was given: what was promised is the planned rounds
            return round < self.rounds
        charged = self.charged(cohort, round)
        events = self._events(round) * times
        if self._planned() <= plan.target and self.ledger.within(self._whole(), events, charged):
            return True  # a part of the plan costs no more than the plan, whatever its own bound is
        if plan.search:
            return False
        return self.ledger.fits(events, charged, plan.target, plan.delta, plan.accountant)

    def charge(self, cohort: Sequence[int], round: int) -> None:
        """Enter this round into the ledger.

        Guarantee: when this returns all of it is on disk, with the events that ``release`` makes true.
        """
        for event in self._events(round):
            self.ledger.charge(round, event, self.charged(cohort, round))

    def _events(self, round: int) -> list[Event]:
        """What a round releases: its noised work, and figures where those are a release of their own."""
        figures = self.metrics_noise if told.due(self.plan, round) else None
        return [self.plan.event(self.noise), *(self.plan.apart(figures) if figures else ())]

    def charged(self, cohort: Sequence[int], round: int) -> list[str] | None:
        """Whom a round is charged to: client ids, or None for the run as a whole."""
        who = self.plan.charged(cohort, len(self.ids), round)
        return None if who is None else [self.ids[i] for i in who]

    def numbers(self, round: int) -> dict[str, float]:
        """What the clients are told."""
        self.state["round"] = round
        numbers = self.plan.numbers(self.noise, self.state)
        if self.metrics_noise and told.due(self.plan, round):
            numbers = numbers | {"figures": self.metrics_noise}
        return numbers

    def release(self, sums: Callable[[], dict[str, Params]]) -> dict[str, Params] | None:
        """Noised mean of what the clients sent, or None where an ordinary mean is private already."""
        if not self.plan.central:
            return None
        released = self.plan.server(sums(), self.state, self.noise, len(self.ids))
        if released is None:
            return None
        mean, self.state = released
        return mean

    def told(
        self, means: dict[str, Params], task: Task, reported: int, scored: bool
    ) -> dict[str, float]:
        """Figures inside the budget, taken out of the ``means`` of what so many clients sent.

        ``scored``: whether there is an accuracy beside the loss.
        """
        mean, plan = means.pop(TOLD, {}).get("sum"), self.plan
        if mean is None or "figures" not in task.privacy:
            return {}
        clients = (plan.share() or 0.0) * len(self.ids) if plan.central else float(reported)
        spread = plan.spread(self.noise, self.state, len(self.ids))
        total, std = plan.heard(mean.double().cpu(), task, clients, spread)
        kept = ["noised_loss", *(["noised_accuracy", "noised_error"] if scored else [])]
        if not plan.metrics_count:
            found = told.read(total.tolist(), std, plan.metrics_loss, clients, 0.0)
            return {k: v for k, v in found.items() if k in kept}
        count, off = 2 * float(total[0]), 2 * std
        if plan.per_client and reported == len(self.ids):
            # all are there, with the examples that they had before: so far their mean is the best guess
            seen, times = self.state.get("counted", (0.0, 0))
            self.state["counted"] = seen, times = seen + count, times + 1
            count, off = seen / times, off / math.sqrt(times)
        found = told.read(total.tolist(), std, plan.metrics_loss, count, off)
        return {k: v for k, v in found.items() if k in kept} | {"noised_count": max(count, 0.0)}

    def mark(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Figures by name, what the guarantee does not cover marked so (left out when strict)."""
        return mark(self.plan, figures)

    def figures(self) -> dict[str, float]:
        """What the guarantee stands at after a round."""
        return {
            "privacy_epsilon": self.spent(),
            "privacy_epsilon_planned": self._planned(),
            "privacy_noise_multiplier": self.noise,
            "privacy_noise_std": self.plan.spread(self.noise, self.state, len(self.ids)),
            "privacy_clip_norm": float(self.state.get("clip", self.plan.clip)),
        }

    def spent(self) -> float:
        """Epsilon of the run so far, at the plan's delta; a part of the plan costs no more than it all."""
        if self.plan.search:
            return self.plan.price(self.ledger.most())
        spent = self.ledger.spent(self.plan.delta, self.plan.accountant)
        part = self.ledger.within(self._whole())
        return min(spent, self._planned()) if part else spent

    def _planned(self) -> float:
        """Epsilon of all rounds of the plan."""
        return self._all()[1]

    def _whole(self) -> tuple[Event, ...]:
        """All that one unit is charged for in them."""
        return self._all()[0]

    def _all(self) -> tuple[tuple[Event, ...], float]:
        """Both, found once: every round asks for them some three times."""
        known = self.noise, self.rounds, self.metrics_noise
        if self._found is None or self._found[0] != known:
            self._found = known, self.plan.whole(*known), self.plan.planned(*known)
        return self._found[1:]

    @property
    def delta(self) -> float:
        """Chance of failure; none with Laplace noise."""
        if self.plan.event(self.noise).mechanism == "laplace":
            return 0.0
        return self.plan.delta + self.plan.slack(self.noise, self.rounds)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "plan": type(self.plan).__name__,
            "noise": self.noise,
            "rounds": self.rounds,
            "state": {k: v for k, v in self.state.items() if k != "zeros"},
            "ledger": self.ledger.state_dict(),
            **({"metrics_noise": self.metrics_noise} if self.metrics_noise else {}),
        }

    def load_state_dict(self, saved: dict[str, Any] | None, ledger: Ledger | None = None) -> None:
        """Go on with the run's own noise (more rounds than planned do not change it) and ledger.

        Raises ConfigError when the checkpoint is of a run without privacy, or the ledger is missing, edited
        or shorter than the checkpoint says.
        """
        if saved is None:
            raise ConfigError(DISAGREE)
        if saved["plan"] != type(self.plan).__name__:
            raise ConfigError(
                f"the checkpoint was trained with {saved['plan']}, which hides something else than "
                f"{type(self.plan).__name__}: one run has one plan"
            )
        self.ledger = Ledger.resume(None, saved["ledger"]) if ledger is None else ledger
        if [e.event for e in self.ledger.entries if e.round == BEFORE] != [*self.plan.once]:
            raise ConfigError(
                "the run's ledger and privacy.statistics_noise do not agree on what was released before "
                "round 0: go on with the plan that the run began with"
            )
        if (saved.get("metrics_noise") is None) != (self.metrics_noise is None):
            raise ConfigError(
                "the run and privacy.metrics_epsilon do not agree on whether figures are told inside the "
                "budget: go on with the plan that the run began with"
            )
        self.noise, self.rounds = saved["noise"], saved["rounds"]
        self.metrics_noise = saved.get("metrics_noise")
        if self.plan.target is None:  # no budget ends such a run: what is promised is all of it
            self.rounds = max(self.rounds, self.plan.rounds or 0)
        self.state |= saved["state"]
        if "past" in self.state and len(self.ledger) > saved["ledger"]["count"]:
            # rounds after the checkpoint took this noise back already; once more would show the clients
            # of earlier rounds a second time, uncharged: the correlated noise starts anew
            self.state["past"] = []


def charge(books: "PrivateRun | OpenRun", asked: Sequence[Sequence[int]], round: int) -> None:
    """Enter a round before anything is sent: what is asked for is paid for, whatever comes back.

    ``asked``: indices of clients, and once more of those that are asked again. Raises BudgetSpent.
    """
    if not books.affordable(asked, round):
        raise BudgetSpent(
            f"round {round + 1} would spend more than the privacy plan's epsilon: the model so far is "
            "the last the budget pays for"
        )
    for who in asked:
        books.charge(who, round)


def opened(plan: Privacy, ids: Sequence[str], groups: dict[str, Params]) -> "PrivateRun | OpenRun":
    """The books of a run under ``plan``; ``groups`` has the shapes of what a client sends."""
    return PrivateRun(plan, ids, groups) if plan.claims else OpenRun()
