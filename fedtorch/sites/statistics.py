"""Statistics of columns over sites: one round before the first, by which all scale their rows alike.

What a site sends is what ``privacy.columns`` has each client release. It is charged to the site's own
ledger before it is computed, and kept on its disk before it leaves: asked again, by a server that was
started again or lost the answer, a site sends the very same numbers, which cost nothing more.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedtorch import disk
from fedtorch.data.base import Asks, Data
from fedtorch.engines import messages
from fedtorch.engines.messages import Expected, Outcome
from fedtorch.engines.wire import Message, MessageError
from fedtorch.privacy import columns
from fedtorch.privacy.clipping import joint_norms
from fedtorch.sites.offer import Plan
from fedtorch.sites.reports import FACTS, LONGEST
from fedtorch.types import ConfigError, Released

STATISTICS = "statistics"
HOLD_SECONDS = 20.0
"""How long a site that has answered is kept waiting for the others at a time."""

log = logging.getLogger("fedtorch.sites")


def statistics_asked(plan: Plan) -> columns.Statistics:
    """What the plan asks of a site's rows."""
    return columns.kind_of(plan.statistics, [*plan.ranges.values()])


def asking(plan: Plan, names: Sequence[str]) -> "Asking | None":
    """The round of statistics that is to come; None where the plan has none, or what came of it."""
    return Asking(plan, names) if plan.standardize and not plan.center else None


class Asking:
    """The server's side: who was asked, and what they sent. Any thread may call."""

    def __init__(self, plan: Plan, names: Sequence[str]) -> None:
        """Nobody has answered yet."""
        self.plan, self.names, self.asked = plan, names, statistics_asked(plan)
        self.length = self.asked.vectors(np.zeros((0, len(plan.standardize)))).shape[1]
        """Numbers that a site sends."""
        self.nonces = {n: secrets.token_hex(16) for n in names}
        self.sent: dict[str, np.ndarray] = {}
        self.declined: set[str] = set()
        self.over = self.settled = False
        self.change = threading.Condition()

    def handle(self, method: str, site: str, message: Message) -> Message | None:
        """The answer to a call that is about statistics; None: it is about something else."""
        with self.change:
            if method == "report" and message.facts.get("visit") == self.nonces[site]:
                return self._report(site, message)
            if method != "fetch" or message.facts.get("scaled") is True:
                return None
            end = time.monotonic() + HOLD_SECONDS
            while not self.over and self._answered(site):
                if (left := end - time.monotonic()) <= 0:
                    return Message("wait")
                self.change.wait(left)
            if self.over:  # another plan, with the numbers in it, or the end
                return Message("rejoin") if self.settled else None
            return Message("statistics", {"visit": self.nonces[site]})

    def wait(self, seconds: float) -> bool:
        """Whether all have answered, after so many seconds at most."""
        with self.change:
            return self.change.wait_for(lambda: all(map(self._answered, self.names)), seconds)

    def close(self, settled: bool) -> None:
        """Ask nobody any more; ``settled``: the statistics are known."""
        with self.change:
            self.over, self.settled = True, settled
            self.change.notify_all()

    def read(self) -> tuple[Plan, str]:
        """The plan with centers and widths in it, and a warning where they are mostly noise."""
        assert self.plan.privacy is not None  # a plan with statistics has one
        sent = [self.sent[n] for n in sorted(self.sent)] or [np.zeros(self.length)]
        center, width, warning = columns.read(self.plan.privacy, self.asked, sent)
        return replace(self.plan, center=center.tolist(), width=width.tolist()), warning

    def _answered(self, site: str) -> bool:
        return site in self.sent or site in self.declined

    def _report(self, site: str, message: Message) -> Message:
        if self.over or self._answered(site):
            raise MessageError("its statistics are there already, or come too late: discarded")
        vector = self._checked(site, message)
        if vector is None:
            self.declined.add(site)
            log.warning("%s sends no statistics of its columns: its privacy budget is spent", site)
        else:
            self.sent[site] = vector
        self.change.notify_all()
        return Message("thanks")

    def _checked(self, site: str, message: Message) -> np.ndarray | None:
        """What a site sent, None where it declines; raises MessageError for anything else."""
        outcome = Message("outcome", message.facts, message.groups)
        update, failures, _ = messages.read_outcome(outcome, [site])
        if not update.ids and [f.kind for f in failures] == ["budget"]:
            return None
        if message.facts.keys() - FACTS or not update.ids or update.metrics:
            raise MessageError("it sends something else than statistics of columns")
        shape = torch.Size([self.length]), torch.float64
        messages.check(update, Expected({STATISTICS: {STATISTICS: shape}}, {}))
        privacy = self.plan.privacy
        most = self.asked.norm * (1 + 1e-6) if privacy is not None and privacy.central else LONGEST
        if not (norm := float(joint_norms(update.sent))) <= most or update.weight.tolist() != [1.0]:
            raise MessageError(f"its statistics have norm {norm:.6g}; at most {most:.6g} is taken")
        return update.sent[STATISTICS][STATISTICS][0].numpy()


class Told:
    """The site's side: what it has told of its columns and how it scales them, by run, on its own disk."""

    def __init__(self, folder: Path) -> None:
        """Read what earlier processes have told; raises ConfigError where that is damaged."""
        self.path = folder / "statistics.json"
        self.runs: dict[str, dict[str, list[float]]] = {}
        if not self.path.exists():
            return
        try:
            self.runs = json.loads(disk.regular(self.path).read_text(encoding="utf-8"))
            if not all(np.isfinite(v).all() for run in self.runs.values() for v in run.values()):
                raise ValueError("a number is none")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
            raise ConfigError(
                f"{self.path}, which holds what this site has told of its columns, cannot be used ({e}): "
                "put the state folder back as it was"
            ) from e

    @property
    def charged(self) -> int:
        """Charges that this site's ledgers have for statistics, at least."""
        return sum("sent" in run for run in self.runs.values())

    def sent(self, run: str) -> np.ndarray | None:
        """What was sent in a run; None: nothing yet."""
        kept = self.runs.get(run, {}).get("sent")
        return None if kept is None else np.array(kept)

    def keep(self, run: str, **numbers: list[float]) -> None:
        """Numbers of a run; they are on disk when this returns, or ConfigError says why not."""
        self.runs[run] = self.runs.get(run, {}) | numbers
        try:
            with disk.whole(self.path, private=True) as file:
                file.write(json.dumps(self.runs).encode())
        except OSError as e:
            raise ConfigError(f"{self.path} cannot be written: {e.strerror}") from e

    def scaled(self, plan: Plan, data: Data) -> Data:
        """The data as the plan scales them, which stays so for the whole run; raises ConfigError."""
        asks = agreed(plan, data)
        if asks is None or not plan.center:
            return data
        kept = self.runs.get(plan.run, {})
        if [kept.get("center", plan.center), kept.get("width", plan.width)] != [
            plan.center,
            plan.width,
        ]:
            raise ConfigError(
                f"run {plan.run} was joined with other centers and widths of its columns than it has now"
            )
        if "center" not in kept:
            self.keep(plan.run, center=plan.center, width=plan.width)
        return scaled(plan, asks)


def agreed(plan: Plan, data: Data) -> Asks | None:
    """What the data ask for, where that is what the plan releases; raises ConfigError where it is not."""
    asks = data.asks
    if asks is None and not plan.standardize:
        return None
    own = dict(zip(asks.columns, asks.bounds, strict=True)) if asks else {}
    if asks is not None and own == plan.ranges and asks.kind == plan.statistics:
        return asks
    if not plan.standardize:
        raise ConfigError(
            "dataset.standardize private scales by statistics of all sites, and the run has none: leave "
            "it out, and dataset.bounds scale by themselves, or have the server ask by its standardize"
        )
    raise ConfigError(
        f"the run scales columns by private {plan.statistics} of all sites, and these data are scaled in "
        f"another way: give --dataset.standardize private --dataset.bounds {','.join(plan.standardize)}"
        + (f" --dataset.statistics {plan.statistics}" if plan.statistics != "quartiles" else "")
    )


def scaled(plan: Plan, asks: Asks) -> Data:
    """The data by the plan's numbers, each column by its own."""
    place = {name: k for k, name in enumerate(plan.ranges)}
    order = [place[name] for name in asks.columns]
    return asks.answer([plan.center[k] for k in order], [plan.width[k] for k in order], "")


def portion(plan: Plan, asks: Asks, site: str) -> np.ndarray:
    """What a site sends of its rows: released by the plan, and to be charged before this is called."""
    assert plan.privacy is not None
    place = {name: k for k, name in enumerate(asks.columns)}
    rows = asks.rows[:, [place[name] for name in plan.ranges]]
    found = statistics_asked(plan)
    return plan.privacy.portion(found.vectors(rows), site, found.norm)


def told(site: str, vector: np.ndarray) -> Outcome:
    """The same as a visit that came to it."""
    sent = {STATISTICS: {STATISTICS: torch.from_numpy(vector)[None]}}
    return Outcome(Released.received((site,), sent, {}, torch.ones(1), {}), [], {})


def words(plan: Plan) -> str:
    """Each column's center and width."""
    each = zip(plan.ranges, plan.center, plan.width, strict=True)
    return ", ".join(f"{name} {center:.4g} +- {width:.4g}" for name, center, width in each)
