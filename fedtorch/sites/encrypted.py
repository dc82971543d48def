"""The server's half of encrypted sums (CKKS): it adds what it cannot read, and a site opens it."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from fedtorch.engines import wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.recipe import Recipe
from fedtorch.secure.encryption import SLOTS
from fedtorch.secure.he import HE
from fedtorch.secure.roster import LEAST
from fedtorch.sites import letters
from fedtorch.sites.engine import Sites, SitesSession, over
from fedtorch.sites.reports import Visit
from fedtorch.sites.rpc import log
from fedtorch.sites.sealed import Vector, read_public
from fedtorch.sites.sums import check_apart
from fedtorch.training.module import snapshot
from fedtorch.training.personal import personal
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
        own = personal(model, recipe.strategy.personal)
        self.given = {k: v.cpu() for k, v in snapshot(model).items() if k not in own}
        self.sealed: dict[str, list[bytes]] = {}
        """Ciphertexts of this round, by site, in the order in which they came."""
        self.opener, self.sum = "", list[bytes]()
        self.opened: np.ndarray | None = None
        super().__init__(options, model, names, recipe)
        self.needed = max(options.minimum, LEAST)

    def room(self, numbers: int, groups: int) -> int:
        """Bytes of the largest message: ciphertexts are larger than numbers."""
        blocks = -(-(numbers * groups + 8) // SLOTS)
        return max(super().room(numbers, groups), blocks * CIPHERTEXT)

    # the server's thread

    def submit(self, ids: Sequence[str], task: Task) -> None:
        """Put up a task for these sites."""
        with self.change:
            self.sealed, self.opener, self.opened = {}, "", None
            self.vector = Vector.of(self.reader, task.filled(self.given), len(ids))
        super().submit(ids, task)

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
                    kind = "late" if visit.taken else "absent"
                    why = f"no report in {self.options.deadline:g} s"
                    visit.outcome = Failure(name, kind, why)
        total = self._open_sum(visits)
        with self.change:
            self.visits, self.last = {}, [*visits.values()]
        if total is not None:
            for name in total.ids:
                visits[name].outcome, self.counted[name] = total, visits[name].nonce
            yield total
        for visit in self.last:
            if isinstance(visit.outcome, Failure):
                yield visit.outcome

    def _open_sum(self, visits: dict[str, Visit]) -> Released | None:
        came = [i for i in visits if i in self.sealed]
        least = max(LEAST, self.least)
        if len(came) < least:
            why = f"{len(came)} sites reported, and {least} are needed to open a sum"
        else:
            self.sum = self.adder.add([self.sealed[i] for i in came])
            why = "no site opened the sum"
            first = self.vector.task.round % len(came)
            for name in came[first:] + came[:first]:
                if (found := self._asked(name)) is not None:
                    return self.vector.unseal(found, came)
                log.warning("%s did not open the sum: another site is asked", name)
        for name in came:
            visits[name].outcome = Failure(name, "toofew", why)
        return None

    def _asked(self, name: str) -> np.ndarray | None:
        """What a site opens; None where it does not, in the time that it has."""
        with self.change:
            self.opener, self.opened = name, None
            self.change.notify_all()
            self.change.wait_for(
                lambda: self.opened is not None or not self.opener, self.rule.phase_seconds
            )
            found, self.opener = self.opened, ""
            return found

    # the sites' threads

    def _due(self, site: str, asked: Message) -> bool:
        visit = self._open(site)
        if visit is None:
            return False
        if site != self.opener:
            return site not in self.sealed
        if (
            asked.facts.get("visit") != visit.nonce
        ):  # started again: it no longer knows what to open
            self.opener = ""
            self.change.notify_all()
            return False
        return True

    def _message(self, visit: Visit, asked: Message, **more: object) -> Message:
        if visit.site == self.opener:
            return Message(
                "phase", {"visit": visit.nonce, "phase": "open"}, letters.blocks(self.sum)
            )
        return super()._message(
            visit, asked, he={"asked": self.vector.asked, "key": self.key.hex()}
        )

    def _report(self, site: str, message: Message, size: int) -> bytes:
        phase = message.facts.get("phase")
        if phase is None and not message.facts.get("ids"):
            if site == self.opener:
                with self.change:
                    self.opener = ""
                    self.change.notify_all()
                return wire.encode(Message("thanks"))
            return super()._report(site, message, size)
        with self.change:
            visit = self._open(site)
            if visit is None or message.facts.get("visit") != visit.nonce:
                raise MessageError(over(message))
            if phase == "open" and site == self.opener:
                try:
                    values = message.groups.get("secure", {}).get("values", torch.zeros(0))
                    self.opened = self.vector.checked(values, len(self.sealed))
                except MessageError:
                    self.opener = ""
                    raise
                finally:
                    self.change.notify_all()
            elif phase == "sealed" and site not in self.sealed and not self.opener:
                try:
                    code = letters.read_blocks(message, self.vector.blocks)
                    self.adder.look(code, self.vector.size)
                except (ConfigError, MessageError) as e:
                    visit.outcome = Failure(site, "refused", str(e))
                    raise MessageError(str(e)) from e
                finally:
                    self.change.notify_all()
                self.sealed[site] = code
                self.change.notify_all()
            else:
                raise MessageError(over(message))
            visit.received, visit.seconds = visit.received + size, time.monotonic() - visit.asked
        return wire.encode(Message("thanks"))
