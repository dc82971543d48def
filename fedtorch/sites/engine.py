"""The engine whose clients are sites: the server's side of every visit.

Sites call in for work and bring back what they made of it. Nothing they send is believed before it has
been checked against what this model and strategy send, and no site can hold up or end a round.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fedtorch.client import Client
from fedtorch.engines import messages, wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.recipe import Recipe
from fedtorch.run.versions import installed
from fedtorch.secure.aggregator import Secure
from fedtorch.secure.he import HE
from fedtorch.sites import alike
from fedtorch.sites import offer as plans
from fedtorch.sites.callers import Callers
from fedtorch.sites.flower import Flower
from fedtorch.sites.reports import Assignment, Reader, check_enough, judge
from fedtorch.sites.rpc import Listener, log
from fedtorch.sites.statistics import asking
from fedtorch.training.losses import LOSSES
from fedtorch.training.module import snapshot
from fedtorch.training.personal import personal, shared
from fedtorch.types import ConfigError, Failure, Params, Released, Task

if TYPE_CHECKING:
    from fedtorch.sites.relay import GridListener

HOLD_SECONDS = 20.0
"""How long a call for work is held open when there is none."""
SMALL = 4096
"""Bytes of a message without tensors."""
ALIVE_SECONDS = 3 * HOLD_SECONDS
"""A site that has not called for so long counts as away."""


@dataclass(frozen=True)
class Remote:
    """A client of whom the server knows the name alone."""

    id: str


def remotes(names: Sequence[str]) -> list[Client]:
    """What ``Server`` takes as clients; it asks them for nothing but their id."""
    return cast(list[Client], [Remote(n) for n in names])


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Clients train at their sites."""

    plan: plans.Plan
    address: str = "127.0.0.1:8443"
    """Where to listen, HOST:PORT."""
    keys: Path | None = None
    """Folder with key.pem, cert.pem and ca.pem; none: no TLS, loopback only."""
    flower: Flower | None = None
    """A SuperLink to call over, in place of an address and keys of one's own."""
    deadline: float = 600.0
    """Seconds a round waits for its sites."""
    public: Path | None = None
    """The public key of sums under homomorphic encryption."""
    minimum: int = 1
    """Sites that must report for a round to count."""
    enough: int | None = None
    """Over-selection: a round ends when so many have reported; none: it waits for all that were asked."""
    most_examples: int = 10_000_000
    """A site that says it has more is refused."""

    def open(self, model: nn.Module, clients: Sequence[Client], recipe: Recipe) -> "SitesSession":
        """Listen for the sites."""
        if not 1 <= self.minimum <= len(clients):
            raise ConfigError(f"minimum must be between 1 and {len(clients)}, got {self.minimum}")
        known = self.plan.step or recipe.loss is LOSSES[self.plan.loss]
        if not known or (recipe.step is None) != (not self.plan.step):
            raise ConfigError(
                f"sites train by the loss or step of their plan, {self.plan.step or self.plan.loss}, and "
                "take no code from a server: name a step of your own in the plan, package.module:function, "
                "and let every site have it and agree to it by --steps"
            )
        if self.deadline <= 0:
            raise ConfigError(f"deadline must be positive, got {self.deadline}")
        if self.most_examples < 1:
            raise ConfigError(f"most_examples must be at least 1, got {self.most_examples}")
        if self.enough is not None:
            check_enough(self.enough, self.minimum, len(clients), recipe.privacy)
        names = [c.id for c in clients]
        if self.flower and isinstance(recipe.aggregator, HE | Secure):
            raise ConfigError(
                "sums under masks or encryption know sites by certificates of their own, which Flower does "
                "not pass on: leave out engine flower, or aggregator secure or he"
            )
        if isinstance(recipe.aggregator, HE):
            from fedtorch.sites.encrypted import EncryptedSession

            return EncryptedSession(self, model, names, recipe)
        if isinstance(recipe.aggregator, Secure):
            from fedtorch.sites.masked import MaskedSession

            if recipe.privacy.masked:  # each site must know for how many its share is made
                placed = replace(self.plan, privacy=recipe.privacy)
                return MaskedSession(replace(self, plan=placed), model, names, recipe)
            return MaskedSession(self, model, names, recipe)
        return SitesSession(self, model, names, recipe)


class SitesSession:
    """Who is there, and the visits of this round; every method may be called from any thread."""

    notes: tuple[str, ...] = ()

    def __init__(self, options: Sites, model: nn.Module, names: list[str], recipe: Recipe) -> None:
        """Start to listen."""
        state = snapshot(model)
        brought = shared(model, recipe.strategy.personal)
        self.rest = {k: v.cpu() for k, v in state.items() if k not in brought}
        """What a site is given once, unless the model it built itself has the same."""
        own = personal(model, recipe.strategy.personal)
        self.given = {k: v.cpu() for k, v in state.items() if k not in own}
        """What a site's model has before a task is loaded into it, but for what is its own."""
        self.digest, self.parts = messages.digest(self.rest), messages.short_digests(self.rest)
        self.options, self.names = options, names
        self.recipe = recipe
        self.shown = alike.shown(model, options.plan.shape)
        """What a site's model is compared with, as it joins."""
        self.reader = Reader.of(recipe, model, options.most_examples)
        # whether a round counts must not depend on one client where that is what is hidden
        self.least = 0 if recipe.privacy.central else options.minimum
        self.needed = options.minimum
        """Sites that must be there for a round to start."""
        self.seen: dict[str, float] = {}
        silent = options.deadline + ALIVE_SECONDS
        self.callers = {n: Callers(silent) for n in names}
        self.newest: dict[str, Message] = {}
        """The last call for work of each site."""
        self.counted: dict[str, str] = {}
        """The last visit of each site that counted."""
        self.saved: dict[str, str] = {}
        """The same in the last checkpoint that was written."""
        self.visits: dict[str, Assignment] = {}
        self.last: list[Assignment] = []
        self.closing = False
        self.ended = ""
        """Why the run is over, one of ``ends.ENDS``, for the sites; nothing: it is done."""
        self.began = True
        """Whether the run has begun, or goes on: sites are told of the end of such a one alone."""
        self.change = threading.Condition()
        # float64, every group of the strategy, and room for the header
        groups = max(len(self.reader.expected.sent), 1)
        size = self.room(sum(v.numel() for v in state.values()), groups)
        self.asking = asking(options.plan, names)
        """The round of statistics before the first, where the plan has one to come."""
        self.header_limit = self.reader.header_limit()
        size += 8 * self.asking.length if self.asking else 0
        self.limit = limit = size + self.header_limit + SMALL
        self.listener: Listener | GridListener
        if options.flower:
            self.listener = options.flower.listen(limit, self.handle, names)
        else:
            self.listener = Listener(
                options.address, options.keys, len(names), limit, self.handle, names
            )
        self.port = self.listener.port

    def room(self, numbers: int, groups: int) -> int:
        """Bytes of the tensors of the largest message: a model of so many numbers, and groups of them."""
        return numbers * 8 * (groups + 1)

    def least_of(self, asked: int) -> int:
        """Sites that must report for a round to count that asks so many."""
        return self.least

    # the server's thread

    def submit(self, ids: Sequence[str], task: Task) -> None:
        """Put up a task for these sites."""
        with self.change:
            self.visits = {i: Assignment(i, task) for i in ids}
            self.change.notify_all()

    def collect(self) -> Iterator[Released | Failure]:
        """Wait for the sites until enough have answered or the deadline is over; in a fixed order."""
        with self.change:
            most = self.options.enough or len(self.visits)
            self.change.wait_for(
                lambda: (
                    self._reported() >= most
                    or all(v.outcome is not None for v in self.visits.values())
                ),
                self.options.deadline,
            )
            self.last = [*self.visits.values()]
            self.visits = {}  # whatever comes now is late
        for visit in judge(self.last, most, self.least, self.options.deadline):
            outcome = visit.outcome
            assert outcome is not None  # a judge's work
            if isinstance(outcome, Released):
                self.counted[visit.site] = visit.nonce
                yield outcome
            else:
                yield self.missed(visit, outcome)

    def came_to(
        self, total: Released | None, visits: Mapping[str, Assignment]
    ) -> Iterator[Released | Failure]:
        """A round whose updates come as one: the sum of whoever is in it, and why the others are not."""
        self.last = [*visits.values()]
        if total is not None:
            for name in total.ids:
                visits[name].outcome, self.counted[name] = total, visits[name].nonce
            yield total
        for visit in self.last:
            if isinstance(visit.outcome, Failure):
                yield self.missed(visit, visit.outcome)

    def missed(self, visit: Assignment, failure: Failure) -> Failure:
        """Say so of a site that the round goes on without; the failure as it is."""
        if failure.kind in ("late", "absent"):
            number = visit.task.round + 1
            log.warning("round %d goes on without %s: %s", number, visit.site, failure.reason)
        return failure

    def wait_for_sites(self, seconds: float) -> list[str]:
        """Wait until enough sites are there for a round to count; returns who is."""
        end = time.monotonic() + seconds
        with self.change:
            while len(here := self._here()) < self.needed:
                if (left := end - time.monotonic()) <= 0:
                    break
                self.change.wait(min(left, 1))
            return here

    def settle(self, plan: plans.Plan) -> None:
        """Offer the plan with the centers and widths that came of the sites' statistics."""
        self.options = replace(self.options, plan=plan)
        if self.asking:
            self.asking.close(settled=True)

    def figures(self) -> dict[str, float]:
        """Bytes and seconds of each site in the last round; no seconds where a sum hides each."""
        found: dict[str, float] = {}
        for v in self.last:
            found |= {
                f"site_{v.site}_bytes_sent": v.sent,
                f"site_{v.site}_bytes_received": v.received,
                f"site_{v.site}_reported": float(v.updated),
            }
            if not self.recipe.hides:
                found[f"site_{v.site}_seconds"] = round(v.seconds, 3)
        return found

    def memory(self) -> dict[str, dict[str, Params]]:
        """Sites keep their memory; for the checkpoint, which visit of each was the last to count."""
        names = {i: torch.tensor([*bytes.fromhex(n)]) for i, n in self.counted.items()}
        return {i: {"visit": {"nonce": nonce}} for i, nonce in names.items()}

    def restore(self, memory: dict[str, dict[str, Params]]) -> None:
        """Go on from a checkpoint: later visits have not been."""
        self.counted = {i: bytes(m["visit"]["nonce"].tolist()).hex() for i, m in memory.items()}
        self.saved = {**self.counted}

    def close(self) -> None:
        """Tell sites that call that the run is over, unless it never began, and stop listening."""
        if self.asking and not self.asking.over:
            self.asking.close(settled=False)
        with self.change:
            self.closing = True
            waiting = {*self._here()}
            self.change.notify_all()
        end = time.monotonic() + 3
        while self.began and waiting & {*self._here()} and time.monotonic() < end:
            time.sleep(0.05)  # each is taken off the list when it has heard
        self.listener.close()

    def _reported(self) -> int:
        return sum(v.updated for v in self.visits.values())

    # the sites' threads

    def handle(self, method: str, site: str, data: bytes) -> bytes:
        """Answer one call."""
        if method == "report":
            message = wire.decode(data, self.limit, self.header_limit)
        else:
            message = wire.decode(data, SMALL + 32 * len(self.parts))
        if message.kind != method:
            raise MessageError(f"a message of kind {wire.short(message.kind)} cannot {method}")
        with self.change:
            if method != "report" and self.callers[site].turned_away(message.facts.get("process")):
                log.warning("turned away a second process of %s, beside one that is at work", site)
                return wire.encode(Message("second"))
            if site not in self._here():
                log.info("%s is here", site)
            self.seen[site] = time.monotonic()
            self.change.notify_all()
        if method == "join":
            told: dict[str, Any] = {"plan": plans.describe(self.options.plan), "base": self.digest}
            told |= {"model": self.shown, "version": installed("fedtorch")}
            return wire.encode(Message("plan", told))
        if message.facts.get("run") != self.options.plan.run:
            return wire.encode(Message("rejoin"))
        if self.asking and (answer := self.asking.handle(method, site, message)):
            return wire.encode(answer)
        if method == "report":
            return self._report(site, message, len(data))
        return self._fetch(site, message)

    def _lacks(self, told: Mapping[str, object]) -> Params:
        """What of the weights that no round carries is not at a site as it is here."""
        own = told.get("own")
        if told.get("has") == self.digest:
            return {}
        if not isinstance(own, list) or len(own) != len(self.parts):
            return self.rest
        each = zip(sorted(self.rest), self.parts, own, strict=True)
        return {k: self.rest[k] for k, part, theirs in each if part != theirs}

    def _fetch(self, site: str, asked: Message) -> bytes:
        end = time.monotonic() + HOLD_SECONDS
        with self.change:
            self.newest[site] = asked
            # an older call is of a process that died, or of a line that broke
            while not (self.closing or self.newest[site] is not asked or self._due(site, asked)):
                if (left := end - time.monotonic()) <= 0:
                    break
                self.change.wait(left)
            if self.newest[site] is not asked:
                return wire.encode(Message("wait"))
            self.seen[site] = time.monotonic()
            if self.closing and self.began:
                self.seen.pop(site, None)
                return wire.encode(Message("end", {"why": self.ended} if self.ended else {}))
            visit = self._open(site)
            if visit is None or not self._due(site, asked):
                return wire.encode(Message("wait"))
            message = self._message(visit, asked)
        data = wire.encode(message)
        visit.sent += len(data)
        return data

    def _due(self, site: str, asked: Message) -> bool:
        """Whether there is something for a site that calls for work."""
        return self._open(site) is not None

    def _message(self, visit: Assignment, asked: Message, **more: Any) -> Message:
        """The task, for a site that calls for work."""
        visit.taken = True
        left = self.options.deadline - (time.monotonic() - visit.asked)
        facts = {"visit": visit.nonce, "after": self.counted.get(visit.site, ""), "seconds": left}
        if saved := self.saved.get(visit.site):
            facts["saved"] = saved
        message = messages.task_message(visit.task, **facts, **more)
        lacks = self._lacks(asked.facts)
        once = {"rest": lacks} if lacks else {}
        return Message(message.kind, message.facts, message.groups | once)

    def _report(self, site: str, message: Message, size: int) -> bytes:
        with self.change:
            visit = self._open(site)
        if visit is None or message.facts.get("visit") != visit.nonce:
            raise MessageError(over(message))
        try:
            result = self.reader.read(site, visit.task, message)
        except MessageError as e:
            log.warning("round %d: refused the report of %s: %s", visit.task.round + 1, site, e)
            result = Failure(site, "refused", str(e))
        with self.change:
            if self.visits.get(site) is not visit or visit.outcome is not None:
                raise MessageError(over(message))
            visit.outcome = result
            visit.place = sum(v.outcome is not None for v in self.visits.values())
            visit.received, visit.seconds = size, time.monotonic() - visit.asked
            self.change.notify_all()
        if isinstance(result, Failure) and result.kind == "refused":
            raise MessageError(result.reason)
        return wire.encode(Message("thanks"))

    def _open(self, site: str) -> Assignment | None:
        visit = self.visits.get(site)
        return visit if visit is not None and visit.outcome is None else None

    def _here(self) -> list[str]:
        now = time.monotonic()
        return [s for s in self.names if now - self.seen.get(s, -1e9) < ALIVE_SECONDS]


def over(message: Message) -> str:
    """Why a report is not taken that comes too late or again."""
    number = message.facts.get("round")
    # longer ones Python does not even print
    known = isinstance(number, int) and 0 <= number < 1 << 31
    which = int(number or 0) + 1 if known else "?"
    return f"its visit of round {which} is over, or was reported before: discarded"
