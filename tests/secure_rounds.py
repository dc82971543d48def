"""Rounds of the secure sum with keys that are not secret, for tests."""

import hashlib
import hmac
from dataclasses import replace

import numpy as np

from fedtorch.secure.client import SecureClient
from fedtorch.secure.protocol import PHASES
from fedtorch.secure.roster import Member, Terms, default_threshold
from fedtorch.secure.server import SecureServer


class Fixed:
    """Randomness of a name: what a recorded transcript needs, and no round ever."""

    def __init__(self, name):
        self.name, self.count = name, 0

    def token_bytes(self, size):
        self.count += 1
        return hashlib.shake_256(f"{self.name} {self.count}".encode()).digest(size)

    def randbelow(self, bound):
        return int.from_bytes(self.token_bytes(64), "big") % bound


def terms(n=5, **options):
    members = tuple(
        Member(f"site{i}", hashlib.sha256(b"certificate %d" % i).digest()) for i in range(n)
    )
    neighbours = options.get("neighbours")
    usual = Terms(
        run="run",
        round=3,
        attempt=bytes(range(16)),
        task=hashlib.sha256(b"task").digest(),
        members=members,
        threshold=default_threshold(min(n, (neighbours or n) + 1)),
        width=32,
        range=1.0,
        scale=1000,
        size=7,
    )
    return replace(usual, **options)


def sign(place, statement):
    return hmac.new(b"key of %d" % place, statement, "sha256").digest()


def verify(place, statement, signature):
    return hmac.compare_digest(sign(place, statement), signature)


class Round:
    """A server and its clients; ``tamper`` may change what goes by: (way, phase, place, message)."""

    def __init__(self, terms, gone=None, tamper=None, seed=0, owns=None, clients=None):
        self.terms, self.tamper = terms, tamper or (lambda way, phase, place, message: message)
        self.gone = gone or {}
        n, dtype = len(terms.members), np.uint64 if terms.width == 64 else np.uint32
        self.values = np.random.default_rng(seed).integers(-1000, 1001, (n, terms.size))
        self.words = self.values.astype(dtype)
        self.server = SecureServer(terms, verify)
        kind = clients or SecureClient
        self.clients = [
            kind(
                (owns or {}).get(i, terms),
                i,
                lambda statement, i=i: sign(i, statement),
                verify,
                random=Fixed(f"client {i} of seed {seed}"),
            )
            for i in range(n)
        ]
        self.down = dict.fromkeys(range(n))
        self.seen = []

    def phase(self, phase):
        for place in sorted(self.server.waiting):
            if self.gone.get(place) == phase:
                continue
            client, came = self.clients[place], self.down[place]
            if phase != "keys":
                came = self.tamper("down", phase, place, came)
            given = () if phase == "keys" else (came,)
            given += (self.words[place],) if phase == "masked" else ()
            method = getattr(client, phase)
            sent = self.tamper("up", phase, place, method(*given))
            if sent is not None:
                self.seen.append((phase, place, sent))
                self.server.take(place, sent)
        self.down = self.server.close()

    def run(self):
        for phase in PHASES[:-1]:
            self.phase(phase)
        return self.server.sum()

    def due(self):
        """The sum of whoever is in it, as words."""
        return self.words[list(self.server.survivors)].sum(0, dtype=self.words.dtype)
