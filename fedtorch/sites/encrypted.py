"""The server's half of encrypted sums (CKKS): it adds what it cannot read, and a site opens it."""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from fedtorch.engines import wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.recipe import Recipe
from fedtorch.secure.encryption import SLOTS
from fedtorch.secure.he import HE
from fedtorch.secure.roster import ATTEMPT, LEAST
from fedtorch.secure.tags import TAGS
from fedtorch.sites import letters
from fedtorch.sites.engine import Sites, SitesSession, over
from fedtorch.sites.reports import Assignment
from fedtorch.sites.rpc import log
from fedtorch.sites.sealed import RIDERS, Round, Vector, read_public
from fedtorch.sites.sums import check_apart
from fedtorch.types import ConfigError, Failure, Released, Task

CIPHERTEXT = 2 * 2 * SLOTS * 8 + 1024
"""Bytes of one ciphertext at most: two polynomials of 2 SLOTS numbers, eight bytes each."""


class EncryptedSession(SitesSession):
    """Sites whose updates arrive encrypted, and are opened as one sum, by one of them, or not at all."""

    def __init__(self, options: Sites, model: nn.Module, names: list[str], recipe: Recipe) -> None:
        """Raises ConfigError without the public key, or for a secret one."""
        assert isinstance(recipe.aggregator, HE)
        if options.enough is not None:
            raise ConfigError(
                "enough (over-selection) and aggregator he do not go together: leave one of them out"
            )
        check_apart(options.plan)
        self.rule = recipe.aggregator
        self.adder, self.key = read_public(options.public)
        self.sealed: dict[str, list[bytes]] = {}
        """Ciphertexts of this round, by site, in the order in which they came."""
        self.sum: list[bytes] | None = None
        """The encrypted sum, while it waits for its opener; and what it came to."""
        self.opened: np.ndarray | None = None
        self.begun = False
        """Whether a round was put up by this process."""
        super().__init__(options, model, names, recipe)
        self.needed = max(options.minimum, LEAST)

    def room(self, numbers: int, groups: int) -> int:
        """Bytes of the largest message: ciphertexts are larger than numbers."""
        blocks = -(-(numbers * groups + RIDERS + TAGS) // SLOTS)
        return max(super().room(numbers, groups), blocks * CIPHERTEXT)

    def least_of(self, asked: int) -> int:
        """Of fewer than three, two learn what the third sent."""
        return max(self.least, LEAST)

    # the server's thread

    def submit(self, ids: Sequence[str], task: Task) -> None:
        """Put up a task for these sites."""
        with self.change:
            least, attempt = max(LEAST, self.least), secrets.token_hex(ATTEMPT)
            self.terms = Round(len(ids), least, attempt, self._opener(ids, task.round))
            self.sealed, self.sum, self.opened = {}, None, None
            self.vector = Vector.of(self.reader, task.filled(self.given), len(ids))
        super().submit(ids, task)
        if len(ids) < least:
            why = f"{len(ids)} sites are asked, and {least} are needed to open a sum"
            for visit in self.visits.values():
                visit.outcome = Failure(visit.site, "toofew", why)

    def _opener(self, ids: Sequence[str], number: int) -> str:
        """Who opens the sum: each in its turn, of those who are there.

        Sites hold to one a round, also where it is done again. So a server that was started again waits for
        the one whose turn it is.
        """
        first = number % len(ids)
        turns = [*ids[first:], *ids[:first]]
        if not self.begun:
            self.change.wait_for(lambda: turns[0] in self._here(), self.rule.phase_seconds)
        self.begun = True
        here = self._here()
        return next((i for i in turns if i in here), turns[0])

    def collect(self) -> Iterator[Released | Failure]:
        """The sum of whoever reported in time, and a failure for each of the others."""
        visits = dict(self.visits)
        with self.change:
            self.change.wait_for(
                lambda: all(v.outcome or i in self.sealed for i, v in visits.items()),
                self.options.deadline,
            )
            for name, visit in visits.items():
                if visit.outcome is None and name not in self.sealed:
                    visit.missed(f"no report in {self.options.deadline:g} s")
        total = self._open_sum(visits)
        with self.change:
            self.visits = {}
        yield from self.came_to(total, visits)

    def _open_sum(self, visits: dict[str, Assignment]) -> Released | None:
        came, opener = [i for i in visits if i in self.sealed], self.terms.opener
        if len(came) < self.terms.least:
            why = f"{len(came)} sites reported, and {self.terms.least} are needed to open a sum"
        elif opener not in came:
            why = f"{opener} was to open the sum, and sent nothing itself"
        else:
            total = self.adder.add([self.sealed[i] for i in came])
            if (found := self._asked(total)) is not None:
                return self.vector.unseal(found, came)
            why = f"{opener} did not open the sum"
        log.warning("round %d: no sum was opened: %s", self.vector.task.round + 1, why)
        for name in came:
            visits[name].outcome = Failure(name, "toofew", why)
        return None

    def _asked(self, total: list[bytes]) -> np.ndarray | None:
        """What its opener makes of a sum; None where it does not, in the time that it has."""
        with self.change:
            self.sum = total
            self.change.notify_all()
            self.change.wait_for(lambda: self.sum is None, self.rule.phase_seconds)
            self.sum = None
            return self.opened

    def _end(self, found: np.ndarray | None = None) -> None:
        self.opened, self.sum = found, None
        self.change.notify_all()

    # the sites' threads

    def _due(self, site: str, asked: Message) -> bool:
        visit = self._open(site)
        if visit is None or site not in self.sealed:
            return visit is not None
        if self.sum is None or site != self.terms.opener:
            return False
        if asked.facts.get("visit") != visit.nonce:
            self._end()  # started again: it no longer knows what to open
            return False
        return True

    def _message(self, visit: Assignment, asked: Message, **more: object) -> Message:
        if visit.site in self.sealed:
            assert self.sum is not None  # it was due
            facts = {"visit": visit.nonce, "phase": "open", "sites": [*self.sealed]}
            return Message("phase", facts, letters.blocks(self.sum))
        return super()._message(visit, asked, he=asdict(self.terms) | {"key": self.key.hex()})

    def _report(self, site: str, message: Message, size: int) -> bytes:
        phase = message.facts.get("phase")
        if phase is None and not message.facts.get("ids") and site not in self.sealed:
            return super()._report(site, message, size)  # why it has no update
        code: list[bytes] = []
        if phase == "sealed":
            code = self._looked(site, message)
        with self.change:
            visit = self._open(site)
            if visit is None or message.facts.get("visit") != visit.nonce:
                raise MessageError(over(message))
            if phase == "sealed" and site not in self.sealed and self.sum is None:
                self.sealed[site] = code
                self.change.notify_all()
            elif site == self.terms.opener and self.sum is not None:
                self._opened(message)
            else:
                raise MessageError(over(message))
            visit.received, visit.seconds = visit.received + size, time.monotonic() - visit.asked
        return wire.encode(Message("thanks"))

    def _looked(self, site: str, message: Message) -> list[bytes]:
        """A site's ciphertexts, if they can be added; others need not wait until they are looked at."""
        with self.change:
            visit = self._open(site)
            if visit is None or message.facts.get("visit") != visit.nonce or site in self.sealed:
                raise MessageError(over(message))
            vector = self.vector
        try:
            code = letters.read_blocks(message, vector.blocks)
            self.adder.look(code, vector.whole)
        except (ConfigError, MessageError) as e:
            with self.change:
                visit.outcome = visit.outcome or Failure(site, "refused", str(e))
                self.change.notify_all()
            raise MessageError(str(e)) from e
        return code

    def _opened(self, message: Message) -> None:
        """What the opener says of the sum."""
        if message.facts.get("phase") != "open":
            self._end()  # it declines
            return
        values = message.groups.get("secure", {}).get("values", torch.zeros(0))
        try:
            self._end(self.vector.checked(values, len(self.sealed)))
        except MessageError:
            self._end()
            raise
