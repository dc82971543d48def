"""What a secure round is about, in one digest that goes into every key and under every signature."""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from fedtorch.secure.refused import Refused
from fedtorch.types import Task

LEAST = 3
"""Clients of a round: of two, each would know the other's update from the sum."""
ATTEMPT = 16
"""Random bytes that the server gives each attempt at a round."""
DIGEST = 32


class Member(NamedTuple):
    """Who is asked."""

    name: str
    certificate: bytes
    """SHA-256 of the certificate whose key signs for it."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What every party of an attempt at a round must hold alike; else no mask cancels."""

    run: str
    round: int
    attempt: bytes
    """16 random bytes of the server's."""
    task: bytes
    """Digest of what the party was sent to train on (``task_digest``)."""
    members: tuple[Member, ...]
    """The roster: a party is its place in it."""
    threshold: int
    """Shares that open a secret, and signatures that a party asks for before it opens any."""
    width: int
    """Bits of a number: 64 or 32."""
    range: float
    """Largest absolute value of a coordinate."""
    scale: int
    """Steps in one."""
    size: int
    """Coordinates of the vector."""
    neighbours: int | None = None
    """With how many others each shares masks (even); none: with all."""

    @cached_property
    def context(self) -> bytes:
        """SHA-256 of all of it, each part with its length."""
        found = hashlib.sha256(b"fedtorch secagg 1 context\0")
        numbers = (self.round, self.threshold, self.width, self.scale, self.size)
        parts = [self.run.encode(), self.attempt, self.task, struct.pack("<d", self.range)]
        parts += [str(k).encode() for k in (*numbers, self.neighbours or 0, len(self.members))]
        parts += [p for m in self.members for p in (m.name.encode(), m.certificate)]
        for part in parts:
            found.update(struct.pack("<Q", len(part)) + part)
        return found.digest()

    def check(self) -> None:
        """Raises Refused for terms under which the sum of all could show one."""
        n, names = len(self.members), {m.name for m in self.members}
        if n < LEAST:
            raise Refused("terms", f"a secure round needs {LEAST} clients, and has {n}")
        if len(names) != n or len({m.certificate for m in self.members}) != n:
            raise Refused("terms", "a name or a certificate is twice in the roster")
        if any(len(m.certificate) != DIGEST for m in self.members):
            raise Refused("terms", "a member has no fingerprint of a certificate")
        if len(self.attempt) != ATTEMPT or len(self.task) != DIGEST:
            raise Refused("terms", "the attempt or the task has no digest")
        if self.neighbours is not None and (self.neighbours < 2 or self.neighbours % 2):
            raise Refused("terms", f"{self.neighbours} neighbours: an even number, at least 2")
        holders = min(n, (self.neighbours or n) + 1)
        least = holders // 2 + 1
        if not least <= self.threshold <= holders:
            raise Refused(
                "terms",
                f"a threshold of {self.threshold}: {least} to {holders} of those who hold shares",
            )
        # NaN is in no range
        if self.width not in (32, 64) or not (0 < self.range < math.inf) or self.scale < 1:
            raise Refused("terms", "no such width, range or scale")
        if n * (self.range * self.scale + 0.5) >= 2 ** (self.width - 1):
            raise Refused("terms", "the sum of so many would wrap: lower the scale or the range")
        if self.size < 1 or self.round < 0:
            raise Refused("terms", "no such size or round")

    def place(self, name: str) -> int:
        """Where somebody is in the roster; raises Refused where they are not."""
        for k, member in enumerate(self.members):
            if member.name == name:
                return k
        raise Refused("terms", f"{name} is not in the roster")


def default_threshold(holders: int) -> int:
    """Two thirds of who holds shares, and one: no two lists of survivors can both have so many."""
    return 2 * holders // 3 + 1


def task_digest(task: Task) -> bytes:
    """SHA-256 of all that a client trains on: weights, the strategy's groups, round, seed, rate, plan.

    ``task`` is filled (``Task.filled``), so that what travels makes no difference.
    """
    privacy = {k: float(v).hex() for k, v in sorted(task.privacy.items())}
    facts = [task.round, task.visit, task.seed, float(task.lr).hex(), privacy]
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for group, tree in [("state", task.state), *sorted(task.extras.items())]:
        found.update(f"\n{json.dumps(group)} {len(tree)}\n".encode())
        for name in sorted(tree):
            v = tree[name].detach().cpu().contiguous()
            found.update(f"{json.dumps(name)} {v.dtype} {list(v.shape)}\n".encode())
            found.update(v.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def ring(terms: Terms, keys: Mapping[int, bytes]) -> dict[int, list[int]]:
    """Who shares masks with whom, of those that sent keys: place -> places.

    With ``neighbours`` they are those before and after on a ring whose order the digest of all keys draws
    (Bell et al. 2020): nobody knows it before the last key has come.
    """
    places = sorted(keys)
    half = (terms.neighbours or len(places)) // 2
    if 2 * half >= len(places) - 1:
        return {i: [j for j in places if j != i] for i in places}
    listed = hashlib.sha256(b"".join(struct.pack("<I", k) + keys[k] for k in places)).digest()

    def draw(k: int) -> bytes:
        return hashlib.sha256(terms.context + listed + struct.pack("<I", k)).digest()

    order = sorted(places, key=draw)
    n = len(order)
    steps = [s for h in range(1, half + 1) for s in (h, -h)]
    return {i: sorted(order[(at + s) % n] for s in steps) for at, i in enumerate(order)}


def packed(places: Iterable[int]) -> bytes:
    """Places as they are signed."""
    return b"".join(struct.pack("<I", k) for k in places)


def as_places(found: Sequence[int], terms: Terms, what: str) -> tuple[int, ...]:
    """Places in ascending order, each once; raises Refused for anything else."""
    n = len(terms.members)
    whole = all(type(k) is int and 0 <= k < n for k in found)
    if not whole or any(a >= b for a, b in pairwise(found)):
        raise Refused("message", f"{what} names no places of the roster")
    return tuple(found)
