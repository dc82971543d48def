"""Cryptographic random words: AES-256 in counter mode under a key nobody else has."""

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np

from fedtorch.kernels.processor import wide_cipher

KEY = 32
"""Bytes of a key."""

LIMIT = 1 << 35
"""Bytes under one nonce: half of what the counter can tell apart."""

ROOM = 15
"""Bytes that the cipher wants to have free after what it writes."""


class Scratch:
    """Memory to encrypt from and into, for one stream after another: a core's cache is small."""

    def __init__(self) -> None:
        """Nothing yet: it grows to what is asked for."""
        self.zeros, self.out = bytearray(), np.empty(0, np.uint8)
        self.asked = 0, memoryview(b""), np.empty(0, np.uint64)
        """What ``room`` gave last, most often again."""

    def room(self, size: int) -> tuple[memoryview, np.ndarray]:
        """So many bytes of 0, and where they are encrypted into."""
        if size != self.asked[0]:
            if size > len(self.zeros):
                self.zeros, self.out = bytearray(size), np.empty(size + ROOM, np.uint8)
            self.asked = size, memoryview(self.zeros)[:size], self.out[:size].view(np.uint64)
        return self.asked[1:]


Words = Callable[[int, Scratch], np.ndarray]
"""n -> n random words, uint64, in memory to be used, or written on, before the next call."""


def keystream(key: bytes) -> Words:
    """The words of one key, in order; a key must serve one stream only.

    Counter mode with a counter of 32 bits, which begins at 2: that is what GCM encrypts by. OpenSSL's code
    of GCM is the faster one where AES is wide (0.8 ns a word; its tag is never asked for), and elsewhere
    its counter mode is (1.3 ns to GCM's 1.7): the words are the same. After LIMIT bytes a new nonce begins.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    def begin() -> Any:
        nonce = next(nonces).to_bytes(12)
        mode = modes.GCM(nonce) if wide_cipher() else modes.CTR(nonce + b"\0\0\0\2")
        return Cipher(algorithms.AES(key), mode).encryptor()

    nonces = count()
    cipher, left = begin(), LIMIT

    def words(n: int, scratch: Scratch) -> np.ndarray:
        nonlocal cipher, left
        if 8 * n > left:
            cipher, left = begin(), LIMIT
        zeros, drawn = scratch.room(8 * n)
        cipher.update_into(zeros, scratch.out)
        left -= 8 * n
        return drawn

    return words
