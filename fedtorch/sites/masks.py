"""A site's half of secure aggregation: whom it sums with, and its part in one attempt at a round."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedtorch.engines.wire import Message, MessageError, short
from fedtorch.secure.client import SecureClient
from fedtorch.secure.protocol import Boxes, Confirmations, Roll, Survivors, Up
from fedtorch.secure.roster import Member, Terms
from fedtorch.sites import keys, letters
from fedtorch.sites.openings import Openings
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.sums import Sums
from fedtorch.types import ConfigError, Released, Task

HARMLESS = ("few", "box", "share", "replay", "tags")
"""Refusals that an honest server may meet with: a site leaves that round out, and stays in the run."""

log = logging.getLogger("fedtorch.site")


class Masks:
    """What secure rounds need of a site beside its data: its key, its peers, and what it let be opened."""

    def __init__(self, config: SiteConfig, openings: Openings) -> None:
        """Raises ConfigError where the keys are of a kind that secure aggregation cannot use."""
        if not config.credentials:
            raise ConfigError(
                "the run is one of secure aggregation, in which sites sign what they send: give "
                "--credentials FOLDER (fedtorch keys makes them)"
            )
        self.config, self.openings = config, openings
        own = Path(config.credentials)
        self.authority = (own / "ca.pem").read_bytes()
        pem = (own / "cert.pem").read_bytes()
        self.sign = keys.signer(own)
        self.own = Member(config.name, bytes.fromhex(keys.fingerprint(pem)))
        self.known = {self.own.certificate: keys.verified(pem, config.name, self.authority)}
        """Certificates that hold, by fingerprint."""
        log.info(
            "secure aggregation: the server sees sums with %d other sites or more, and no site's update",
            config.least_peers,
        )
        if not config.peers:
            log.warning(
                "no peers are pinned: whoever holds the authority's key can invent sites around this one "
                "(site.toml [peers])"
            )

    def check(self, terms: Terms) -> None:
        """Refuse a roster with whom this site does not sum; raises MessageError or ConfigError."""
        members = terms.members
        if self.own not in members:
            raise MessageError("the roster has another certificate of this site, or none")
        # a sum is opened by as many as the threshold, whoever else wants it
        if (others := terms.threshold - 1) < self.config.least_peers:
            raise ConfigError(
                f"a sum of this round may have as few as {others} other sites (a threshold of "
                f"{terms.threshold} of {len(members)}), and this site's least_peers is "
                f"{self.config.least_peers}: agree on a higher aggregator.threshold, or on more sites"
            )
        if not self.config.peers:
            return
        pinned = {n: bytes.fromhex(keys.bare_fingerprint(p)) for n, p in self.config.peers.items()}
        for member in members:
            if member == self.own or pinned.get(member.name) == member.certificate:
                continue
            what = "shows another certificate than" if member.name in pinned else "is not among"
            raise ConfigError(
                f"{short(member.name)} {what} this site's peers: its fingerprint is "
                f"{member.certificate.hex()}; if it is right, enter it in site.toml under [peers]"
            )

    def learn(self, terms: Terms, found: dict[int, bytes]) -> None:
        """Look at certificates that came, by place; raises MessageError where one does not hold."""
        for place, pem in found.items():
            if not 0 <= place < len(terms.members):
                raise MessageError("a certificate is of nobody in the roster")
            member = terms.members[place]
            try:
                certificate = keys.verified(pem, member.name, self.authority)
            except ConfigError as e:
                raise MessageError(str(e)) from e
            if bytes.fromhex(keys.fingerprint(pem)) != member.certificate:
                raise MessageError(f"another certificate of {member.name} than the roster names")
            self.known[member.certificate] = certificate

    def refusal(self, terms: Terms, places: Sequence[int], noised: bool) -> str | None:
        """Why this sum is not to be opened; None where it may, and then it is on disk that it was."""
        names = [terms.members[k].name for k in places]
        if len(names) - 1 < self.config.least_peers:
            return f"the sum has {len(names) - 1} other sites, and least_peers is {self.config.least_peers}"
        why = self.openings.refusal(terms.run, terms.round, names, noised)
        if why is None:
            self.openings.keep(terms.run, terms.round, names)
        return why


class Party:
    """This site in one attempt at a round. Its secrets are in memory alone, and end with it."""

    def __init__(self, masks: Masks, sums: Sums, message: Message, run: str, task: Task) -> None:
        """Agree to the terms, or refuse: raises MessageError, ConfigError or Refused."""
        attempt, members, threshold = letters.read_terms(message)
        self.visit: str = message.facts["visit"]
        self.task, self.masks, self.sums = task, masks, sums
        self.terms = sums.terms(run, attempt, members, threshold, task)
        masks.check(self.terms)
        self.vector = np.zeros(0)
        self.half = SecureClient(
            self.terms,
            self.terms.place(masks.own.name),
            masks.sign,
            self._signed,
            confirms=self._refusal,
        )

    @property
    def done(self) -> bool:
        """Whether nothing more is due."""
        return self.half.phase == "done"

    def begin(self, update: Released) -> Message:
        """Keys, once the training is done."""
        self.vector = self.sums.seal(self.terms, update, self.task)
        lacks = any(m.certificate not in self.masks.known for m in self.terms.members)
        return self._report("keys", self.half.keys(), certificates=lacks)

    def go_on(self, message: Message) -> Message:
        """The report that the server's message of a phase asks for; raises Refused or MessageError."""
        if message.facts.get("visit") != self.visit:
            raise MessageError("a phase of a visit that this site is not in")
        phase = self.half.phase
        if message.facts.get("phase") != phase:
            raise MessageError(
                f"asked for phase {short(str(message.facts.get('phase')))} where {phase} is due: each is "
                "given once, in its order"
            )
        if phase == "shares":
            self.masks.learn(self.terms, letters.certificates(message))
        return self._report(phase, self._answer(letters.read_down(phase, message)))

    def _answer(self, down: object) -> Up:
        match down, self.half.phase:
            case Roll(), _:
                return self.half.shares(down)
            case Boxes(), _:
                vector, self.vector = self.vector, np.zeros(0)
                return self.half.masked(down, vector)
            case Survivors(), _:
                return self.half.confirm(down)
            case Confirmations(), _:
                return self.half.open(down)
        raise AssertionError("letters knows no other")

    def _report(self, phase: str, up: Up, **more: object) -> Message:
        facts = {
            "run": self.terms.run,
            "visit": self.visit,
            "round": self.task.round,
            "phase": phase,
        }
        return Message("report", facts | more, letters.up_groups(up))

    def _signed(self, place: int, text: bytes, signature: bytes) -> bool:
        certificate = self.masks.known.get(self.terms.members[place].certificate)
        return certificate is not None and keys.signed(certificate, text, signature)

    def _refusal(self, places: tuple[int, ...]) -> str | None:
        return self.masks.refusal(self.terms, places, self.sums.noised)
