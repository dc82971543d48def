"""What shows whose numbers are in an encrypted sum: a few more numbers, which only holders of the key make.

A server adds ciphertexts as it likes, also its own, or one alone. So each client adds tags to its vector x:
a secret random combination of x, plus a secret number of its own, modulo twice what a number may be. They
add up as vectors do. Whoever opens the sum knows all secrets, and sees whether the tags are those of a sum
of just these clients (a homomorphic authenticator: Agrawal and Boneh 2009, Catalano and Fiore 2013). The
secrets come of the common key and of what the round is about: another round or model has other tags.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedtorch.privacy.noise.keystream import keystream
from fedtorch.privacy.noise.streams import Stream
from fedtorch.secure.primitives import derive

TAGS = 4
"""One is guessed in some 1e5 tries, and all have to be."""


class Tags:
    """Of one round, as its clients agree on it."""

    def __init__(self, secret: bytes, about: dict[str, Any], most: float) -> None:
        """``secret``: the common key; ``about``: plain values; ``most``: how large a number may be."""
        text = json.dumps(about, sort_keys=True).encode()
        self.key = derive(secret, "encrypted tags", hashlib.sha256(text).digest())
        self.most = most

    def of(self, name: str, values: np.ndarray) -> np.ndarray:
        """A client's, for its vector."""
        return self._centred(np.array([*self._combined(values)]) + self._own(name))

    def fit(self, names: Sequence[str], values: np.ndarray, tags: np.ndarray) -> bool:
        """Whether a sum with these tags is that of these clients, each once."""
        wanted = np.array([*self._combined(values)]) + sum(map(self._own, names))
        # decryption errs by 1e-10 a number and client; a combination adds up those of all numbers
        room = 1e-6 + 1e-8 * math.sqrt(len(values) * len(names))
        return bool((np.abs(self._centred(tags - wanted)) <= room).all())

    def _combined(self, values: np.ndarray) -> Iterator[float]:
        for k in range(TAGS):
            yield float(values @ self._uniform(f"combination {k}", len(values)))

    def _own(self, name: str) -> np.ndarray:
        return self.most * self._uniform(f"client {name}", TAGS)

    def _uniform(self, purpose: str, count: int) -> np.ndarray:
        """Numbers in [-1, 1)."""
        words = keystream(derive(self.key, purpose, b""))
        return 2 * Stream(words).uniform(count).numpy() - 1

    def _centred(self, values: np.ndarray) -> np.ndarray:
        return values - 2 * self.most * np.rint(values / (2 * self.most))
