"""The server's half of secure aggregation among sites: it carries the phases, and sees a sum alone."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from fedtorch.engines import wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.recipe import Recipe
from fedtorch.secure.aggregator import Secure
from fedtorch.secure.protocol import PHASES, Down
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import ATTEMPT, LEAST, Member, Terms
from fedtorch.secure.server import SecureServer
from fedtorch.sites import keys, letters
from fedtorch.sites.engine import Sites, SitesSession, over
from fedtorch.sites.reports import Assignment
from fedtorch.sites.rpc import log, read_keys
from fedtorch.sites.sums import Sums, check_apart
from fedtorch.types import ConfigError, Failure, Released, Task

SENT = {
    "keys": "keys",
    "shares": "shares",
    "masked": "a masked update",
    "confirm": "a confirmation",
    "open": "shares that open",
}
"""What a site sends in each phase, in words."""


class Attempt:
    """One attempt at a round: its terms, where it is, and what each site is due."""

    def __init__(self, terms: Terms, pems: Mapping[str, bytes]) -> None:
        """``pems``: certificates that hold, by name. Raises Refused for terms that no site accepts."""
        self.terms = terms
        self.names = [m.name for m in terms.members]
        self.pems = {k: pems[name] for k, name in enumerate(self.names)}
        self.certificates = [keys.read(pems[name]) for name in self.names]
        self.half = SecureServer(terms, self._signed)
        self.down: dict[int, Down] = {}
        """What each site that is still in was sent, or is, in this phase."""
        self.lacking: set[int] = set()
        """Who asked for the others' certificates."""

    def waits_for(self, site: str) -> bool:
        """Whether a site has yet to send in this phase."""
        return site in self.names and self.names.index(site) in self.half.waiting

    def message(self, visit: Assignment) -> Message:
        """What a site needs to go on with the phase."""
        place = self.names.index(visit.site)
        own = self.pems if self.half.phase == "shares" and place in self.lacking else {}
        facts = {"visit": visit.nonce, "phase": self.half.phase}
        return Message("phase", facts, letters.down_groups(self.down[place], own))

    def take(self, site: str, message: Message) -> None:
        """A site's report of this phase; raises Refused or MessageError."""
        place, phase = self.names.index(site), self.half.phase
        self.half.take(place, letters.read_up(phase, message, self.terms.width))
        if message.facts.get("certificates") is True:
            self.lacking.add(place)

    def _signed(self, place: int, text: bytes, signature: bytes) -> bool:
        return keys.signed(self.certificates[place], text, signature)


class MaskedSession(SitesSession):
    """Sites whose updates arrive under masks, and are opened as one sum or not at all."""

    def __init__(self, options: Sites, model: nn.Module, names: list[str], recipe: Recipe) -> None:
        """Raises ConfigError where the run could never be secure."""
        assert isinstance(recipe.aggregator, Secure)
        if options.keys is None:
            raise ConfigError(
                "secure aggregation needs --credentials: sites sign their keys by their certificates "
                "(fedtorch keys makes them)"
            )
        if options.enough is not None:
            raise ConfigError(
                "enough (over-selection) and secure aggregation do not go together: whoever is left out "
                "after the sum was agreed on would have to be taken out of it again; leave one of them out"
            )
        if len(names) < LEAST:
            raise ConfigError(
                f"secure aggregation needs {LEAST} sites or more, and the run has {len(names)}"
            )
        self.secure = recipe.aggregator
        check_apart(options.plan)
        _, _, self.authority = read_keys(options.keys, serves=True)
        self.attempt: Attempt | None = None
        self.asked: tuple[list[str], Task] | None = None
        super().__init__(options, model, names, recipe)
        self.sums = Sums(self.reader, recipe.aggregator)
        self.needed = max(options.minimum, self.secure.needed(len(names)), LEAST)

    def least_of(self, asked: int) -> int:
        """Nothing is opened of fewer than the threshold."""
        return max(self.least, self.secure.needed(asked), LEAST)

    # the server's thread

    def submit(self, ids: Sequence[str], task: Task) -> None:
        """Put up a task for these sites; who of them is there is found when it is collected."""
        with self.change:
            self.asked, self.visits, self.attempt = ([*ids], task), {}, None

    def collect(self) -> Iterator[Released | Failure]:
        """Carry the phases; the sum of whoever came through, and a failure for each of the others."""
        assert self.asked is not None
        ids, task = self.asked
        visits, total = {i: Assignment(i, task) for i in ids}, None
        try:
            with self.change:
                attempt = self._begin(visits, task)
            total = self._sum(attempt, visits, task)
        except Refused as e:
            kind = "toofew" if e.kind == "few" else "refused"
            log.warning("round %d: no sum was opened: %s", task.round + 1, e)
            for visit in visits.values():
                visit.outcome = visit.outcome or Failure(visit.site, kind, str(e))
        finally:
            with self.change:
                self.visits, self.attempt = {}, None
        yield from self.came_to(total, visits)

    def _begin(self, visits: dict[str, Assignment], task: Task) -> Attempt:
        """Who is there is the roster; the others have no part in this round."""
        self.change.wait_for(lambda: {*visits} <= {*self._here()}, self.secure.phase_seconds)
        there = [i for i in visits if i in self._here()]
        shown = {i: self.listener.certificates[i] for i in there}
        for visit in visits.values():
            visit.outcome = self._unfit(visit.site, shown)
        there = [i for i in there if visits[i].outcome is None]
        # of all that were asked: who is away does not make the sum smaller that others let be opened
        threshold = self.secure.needed(len(visits))
        if len(there) < max(threshold, LEAST):
            why = f"{len(there)} sites are there, and {max(threshold, LEAST)} are needed"
            raise Refused("few", why)
        filled = task.filled(self.given)
        members = [Member(i, bytes.fromhex(keys.fingerprint(shown[i]))) for i in there]
        nonce = secrets.token_bytes(ATTEMPT)
        terms = self.sums.terms(self.options.plan.run, nonce, members, threshold, filled)
        self.attempt = Attempt(terms, shown)
        self.visits = visits
        self.change.notify_all()
        return self.attempt

    def _unfit(self, site: str, shown: Mapping[str, bytes]) -> Failure | None:
        if site not in shown:
            return Failure(site, "absent", "it was not there when the round began")
        try:
            keys.verified(shown[site], site, self.authority)
        except ConfigError as e:  # it may have run out since the site joined
            return Failure(site, "refused", str(e))
        return None

    def _sum(self, attempt: Attempt, visits: Mapping[str, Assignment], task: Task) -> Released:
        half, seconds = attempt.half, self.options.deadline
        for phase in PHASES[:-1]:
            with self.change:
                self.change.wait_for(lambda: not self._awaited(attempt), seconds)
                self._late(attempt, phase, seconds)
                if phase == "open":
                    self.attempt = None  # the sum takes its time, and nothing is taken meanwhile
                else:
                    self._close(attempt)
            seconds = self.secure.phase_seconds
        half.close()
        ids = [attempt.names[k] for k in half.survivors]
        for place, of in half.liars.items():
            log.warning(
                "round %d: %s gave a wrong share, of %s", task.round + 1, attempt.names[place], of
            )
        total = self.sums.unseal(attempt.terms, half.sum(), ids, task.filled(self.given))
        if clamped := int(total.metrics["clamped"].sum().round()):
            log.warning(
                "round %d: %d numbers were beyond the range %g and count as that: raise aggregator.range",
                *(task.round + 1, clamped, attempt.terms.range),
            )
        return total

    def _close(self, attempt: Attempt) -> None:
        if attempt.half.phase == "masked":
            came = len(attempt.terms.members) - len(attempt.half.waiting) - len(attempt.half.late)
            if came < self.least:
                raise Refused(
                    "few", f"{came} sites sent a masked update, and minimum is {self.least}"
                )
        attempt.down = attempt.half.close()
        self.change.notify_all()

    def _awaited(self, attempt: Attempt) -> bool:
        return any(self.visits[attempt.names[k]].outcome is None for k in attempt.half.waiting)

    def _late(self, attempt: Attempt, phase: str, seconds: float) -> None:
        for place in attempt.half.waiting:
            visit = self.visits[attempt.names[place]]
            if visit.outcome is None:
                visit.missed(f"it did not send {SENT[phase]} in {seconds:g} s")

    # the sites' threads

    def handle(self, method: str, site: str, data: bytes) -> bytes:
        """Answer one call; who joins must have a certificate that the other sites will take."""
        if method == "join":
            try:
                keys.verified(self.listener.certificates[site], site, self.authority)
            except ConfigError as e:
                raise MessageError(str(e)) from e
        return super().handle(method, site, data)

    def _due(self, site: str, asked: Message) -> bool:
        visit, attempt = self._open(site), self.attempt
        if visit is None or attempt is None or not attempt.waits_for(site):
            return False
        if attempt.half.phase != "keys" and asked.facts.get("visit") != visit.nonce:
            # its keys were in the memory of a process that is gone
            why = f"it was started again before it had sent {SENT[attempt.half.phase]}"
            visit.outcome = Failure(site, "late", why)
            self.change.notify_all()
            return False
        return True

    def _message(self, visit: Assignment, asked: Message, **more: object) -> Message:
        attempt = self.attempt
        assert attempt is not None  # it was due
        if attempt.half.phase != "keys":
            return attempt.message(visit)
        facts = letters.terms_facts(attempt.terms)
        return super()._message(visit, asked, **facts)

    def _report(self, site: str, message: Message, size: int) -> bytes:
        if "phase" not in message.facts and not message.facts.get("ids"):
            return super()._report(site, message, size)  # why it has no update
        with self.change:
            visit, attempt = self._open(site), self.attempt
            if visit is None or attempt is None or message.facts.get("visit") != visit.nonce:
                raise MessageError(over(message))
            phase = message.facts.get("phase")
            if phase and (not attempt.waits_for(site) or phase != attempt.half.phase):
                raise MessageError(over(message))
            try:
                if not phase:
                    raise MessageError("an update that is not masked, which this run does not take")
                attempt.take(site, message)
            except (Refused, MessageError) as e:
                log.warning("round %d: refused what %s sent: %s", visit.task.round + 1, site, e)
                visit.outcome = Failure(site, "refused", str(e))
                raise MessageError(str(e)) from e
            finally:
                self.change.notify_all()
            visit.received, visit.seconds = visit.received + size, time.monotonic() - visit.asked
        return wire.encode(Message("thanks"))
