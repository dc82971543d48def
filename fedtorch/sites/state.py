"""What a site keeps of its visits on its own disk: what it remembers of them, and how many it answered.

The server may lose a visit (the report came late, or the server fell back to a checkpoint), and then the
visit never happened. So memory is kept by visit, and each task says which visit of this site was the last
that counted: that visit's memory is the one to go on from.

A private plan says what ``privacy.rounds`` visits cost; one more would cost more than was said, so that
number is the most, rounds done again included. A plan without privacy is held to its rounds, and each may
be done again after a crash. The count outlives the process: to come back, or to join anew, starts nothing
afresh.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.engines import messages
from fedtorch.engines.wire import MessageError
from fedtorch.run import checkpoint, objects
from fedtorch.secure.aggregator import Secure
from fedtorch.secure.he import HE
from fedtorch.sites.offer import MOST_ROUNDS, Plan
from fedtorch.types import ConfigError, Params

FORMAT = "fedtorch site memory 2"
BASE = "fedtorch site base 2"

log = logging.getLogger("fedtorch.site")

KEPT = 4
"""Newest visits whose memory is kept, beside those that the server goes on from, now or when resumed."""

AGAIN = 10
"""Visits that a plan without privacy may ask for beyond two for each of its rounds."""


class VisitMemory:
    """Memory groups by visit, "run visit" each, newest last."""

    def __init__(self, folder: Path) -> None:
        """Read what an earlier process of this site has left; raises ConfigError when it is damaged."""
        self.path = folder / "memory.pt"
        self.visits: dict[str, dict[str, Params]] = {}
        if self.path.exists():
            self.visits = checkpoint.read(self.path, FORMAT).get("visits", {})
            if not _sound(self.visits):
                raise ConfigError(f"{self.path} is damaged: it holds no memory by visit")

    def after(self, visit: str) -> dict[str, Params] | None:
        """Memory as it was after ``visit`` ("": before any); None when that is gone."""
        return {} if not visit else self.visits.get(visit)

    def elsewhere(self, visit: str) -> bool:
        """Whether a run, whichever, has a visit of this name."""
        return any(kept.endswith(f" {visit}") for kept in self.visits)

    def keep(self, visit: str, memory: dict[str, Params], *stay: str) -> None:
        """Remember what a visit left, before the server hears of it; raises ConfigError if that fails.

        Of the visits before, these ``stay``: the one that it went on from, as many late ones may follow it
        and none of them count; and the last that a checkpoint of the server's knows.
        """
        self.visits.pop(visit, None)
        self.visits[visit] = memory
        for old in [*self.visits][:-KEPT]:
            if old not in stay:
                del self.visits[old]
        try:
            checkpoint.write(self.path, FORMAT, {"visits": self.visits})
        except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
            reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
            raise ConfigError(
                f"{self.path} cannot be written ({reason}): make room and start this site again; it is "
                "given the same visit, which is charged again"
            ) from e


class Base:
    """What a server sent once, the frozen part of a model; of the newest run, and never missed if gone."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "base.pt"

    def of(self, names: Mapping[str, tuple[torch.Size, torch.dtype]]) -> Params:
        """Those that are kept, where all of them have these names, shapes and types; else none."""
        if not names or not self.path.exists():
            return {}
        try:
            found = checkpoint.read(self.path, BASE).get("base", {})
            messages.same_schema(found, {k: names[k] for k in found if k in names})
        except (ConfigError, OSError, MessageError, AttributeError) as e:
            log.info(
                "%s is not of this run, or damaged (%s): the server sends it again", self.path, e
            )
            return {}
        return dict(found)

    def keep(self, base: Params) -> None:
        """Write it; a site whose disk is full asks for it again when it is started again."""
        try:
            checkpoint.write(self.path, BASE, {"base": base}, private=True)
        except (OSError, RuntimeError) as e:
            log.warning(
                "%s cannot be written, and is fetched again after a restart: %s", self.path, e
            )


def _sound(visits: Any) -> bool:
    """Whether it is visit -> group -> name -> tensor."""
    level = [visits]
    for _ in range(3):
        if not all(isinstance(v, dict) for v in level):
            return False
        level = [inner for v in level for inner in v.values()]
    return all(isinstance(v, Tensor) for v in level)


class Answered:
    """Counts of one site; entered before a visit's work begins."""

    def __init__(self, folder: Path) -> None:
        """Read what earlier processes of this site have counted; raises ConfigError when damaged."""
        self.path = folder / "runs.json"
        self.runs: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self.runs = json.loads(disk.regular(self.path).read_text(encoding="utf-8"))
                sound = all(
                    type(e[k]) is int and 0 <= e[k] < MOST_ROUNDS
                    for e in self.runs.values()
                    for k in ("visits", "rounds")
                ) and all("privacy" in e for e in self.runs.values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise self._damaged(str(e)) from e
            if not sound:
                raise self._damaged("a count is none")

    def visits(self, run: str) -> int:
        """Of a run, so far."""
        return int(self.runs.get(run, {"visits": 0})["visits"])

    def charged(self, ledgers: int) -> None:
        """Raises ConfigError where ``ledgers`` have fewer entries than private visits were answered."""
        private = sum(e["visits"] for e in self.runs.values() if e["privacy"] is not None)
        if ledgers < private:
            raise ConfigError(
                f"{self.path} counts {private:,} private visits that this site has answered, and its "
                f"ledgers hold {ledgers:,} charges: put the state folder back as it was, or "
                "give --lost-state true if it is gone for good"
            )

    def agree(self, plan: Plan, budgeted: bool) -> None:
        """Refuse a run whose privacy or masks became others than were joined; raises ConfigError.

        More rounds than were joined are for a site to agree to that has a budget of its own.
        """
        known = self.runs.get(plan.run)
        if known is None:
            return
        privacy, rounds = _promised(plan)
        if known["privacy"] != privacy:
            raise ConfigError(
                f"run {plan.run} was joined with another privacy plan than it has now: a new plan is for a "
                "new run"
            )
        if known.get("secure") not in (None, _masks(plan)):
            raise ConfigError(
                f"run {plan.run} was joined with other terms of secure aggregation than it has now: new "
                "terms are for a new run"
            )
        if privacy is not None and rounds > known["rounds"] and not budgeted:
            raise ConfigError(
                f"run {plan.run} was joined for {known['rounds']:,} private rounds and now asks for "
                f"{rounds:,}, which cost more: agree by giving this site a max_epsilon"
            )

    def summed(self) -> bool:
        """Whether this site has answered a visit of a run of masked or encrypted sums."""
        return any(e.get("secure") is not None for e in self.runs.values())

    def most(self, plan: Plan) -> int | None:
        """Visits of a run that this site will answer; None where the plan does not say how many rounds."""
        if plan.privacy is not None:
            return plan.privacy.rounds
        return None if plan.rounds is None else 2 * plan.rounds + AGAIN

    def beyond(self, plan: Plan, round: int) -> str:
        """Why a visit would be more than the plan said, in a sentence; nothing if it is not."""
        most = self.most(plan)
        if plan.privacy is None and plan.rounds is not None and round >= plan.rounds:
            return f"round {round + 1} is beyond the plan's {plan.rounds:,}"
        if most is None or self.visits(plan.run) < most:
            return ""
        what = "its privacy is for" if plan.privacy else "its rounds, done again twice over, take"
        return f"the run asks for more than the {most:,} visits that {what}"

    def enter(self, plan: Plan) -> None:
        """Count one visit more; it is on disk when this returns, or ConfigError says why not."""
        privacy, rounds = _promised(plan)
        entry = {"visits": self.visits(plan.run) + 1, "rounds": rounds, "privacy": privacy}
        entry |= {"secure": masks} if (masks := _masks(plan)) else {}
        self.runs[plan.run] = entry
        try:
            disk.replace(self.path, json.dumps(self.runs) + "\n")
        except OSError as e:
            raise ConfigError(f"{self.path} cannot be written: {e.strerror}") from e

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self.path}, which counts the visits of each run, cannot be used ({why}): put the state "
            "folder back as it was"
        )


def _masks(plan: Plan) -> Any:
    """What a plan says of masked or encrypted sums, as plain values; None where it has none."""
    if not isinstance(plan.aggregator, Secure | HE):
        return None
    return json.loads(json.dumps(objects.describe(plan)["aggregator"]))


def _promised(plan: Plan) -> tuple[Any, int]:
    """What a plan says of privacy, as plain values, and for how many rounds."""
    if plan.privacy is None:
        return None, plan.rounds or 0
    table = objects.describe(plan)["privacy"]
    rounds = table.pop("rounds") if isinstance(table, dict) else None
    return json.loads(json.dumps(table)), int(rounds or 0)
