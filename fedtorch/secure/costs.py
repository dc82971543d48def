"""What a secure round takes beside the vectors, by formula: a simulation runs none of it."""

from typing import NamedTuple

from fedtorch.secure.protocol import BOX
from fedtorch.secure.shamir import SIZE

SIGNED = 72
"""Bytes of a signature, at most."""
KEYS = 3 * 32 + SIGNED
NUMBER = 1.0e-8
"""Seconds to encode a number."""
WORD = 2.2e-9
"""Seconds to draw a word of 64 bits and add it (AES-256, one core; benchmarks/secure.py)."""
AGREED = 1.2e-4
"""Seconds for two key agreements and what is derived of them, for each neighbour."""
VERIFIED = 1.5e-4
"""Seconds to check a signature of ECDSA P-256."""
TERM = 3.5e-7
"""Seconds for one step of a polynomial over 257 bits."""


class Cost(NamedTuple):
    """Of one round."""

    up: int
    """Bytes that one client sends: its vector, and what masks need."""
    down: int
    """Bytes that one client is sent beside the task."""
    client: float
    """Seconds of one client's processor."""
    server: float
    """Seconds of one core of the server's."""


def cost_of(clients: int, reported: int, near: int, threshold: int, size: int, width: int) -> Cost:
    """With so many asked, reported and neighbours, and vectors of ``size`` numbers of ``width`` bits."""
    vector, words = size * width // 8, size * width / 64
    up = vector + KEYS + BOX * near + SIGNED + SIZE * (near + 1)
    down = KEYS * clients + BOX * near + 4 * reported + SIGNED * near
    signed = VERIFIED * (clients - 1 + near)
    client = (
        signed
        + size * NUMBER
        + near * AGREED
        + 2 * near * threshold * TERM
        + (near + 1) * words * WORD
    )
    gone = clients - reported
    streams = reported + gone * near
    server = VERIFIED * (clients + reported) + streams * words * WORD + gone * near * AGREED / 2
    server += threshold**2 * TERM + 2 * clients * threshold * TERM
    return Cost(up, down, client, server)
