"""One round under masks with all its keys, in one process: what the server sees of each client."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence

import numpy as np

from fedtorch.privacy import Nothing
from fedtorch.secure.aggregator import Secure
from fedtorch.secure.client import SecureClient
from fedtorch.secure.encode import from_words, to_words
from fedtorch.secure.protocol import PHASES
from fedtorch.secure.roster import ATTEMPT, DIGEST, Member
from fedtorch.secure.server import SecureServer


def masked(vectors: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """What clients send of vectors [d] under masks, read as numbers, and the mean that the server opens.

    The protocol of ``fedtorch.secure`` from keys to shares, at width 64. Signatures are of keys made here:
    nobody lies in a picture.
    """
    names = [f"client {k}" for k in range(len(vectors))]
    keys = [secrets.token_bytes(DIGEST) for _ in names]
    terms = Secure().terms(
        run="attack gradient", round=0, attempt=secrets.token_bytes(ATTEMPT), size=len(vectors[0]),
        task=secrets.token_bytes(DIGEST), privacy=Nothing(),
        members=tuple(Member(n, hashlib.sha256(k).digest()) for n, k in zip(names, keys, strict=True)),
    )  # fmt: skip
    coding = Secure().coding(len(names), Nothing())

    def sign(place: int, statement: bytes) -> bytes:
        return hmac.digest(keys[place], statement, "sha256")

    def verify(place: int, statement: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(sign(place, statement), signature)

    server = SecureServer(terms, verify)
    parties = [
        SecureClient(terms, k, lambda s, k=k: sign(k, s), verify)  # type: ignore[misc]
        for k in range(len(names))
    ]
    words = [to_words(coding.encode(v)[0], coding.width) for v in vectors]
    sent, down = list[np.ndarray](), dict[int, object]()
    for phase in PHASES[:-1]:
        for k, party in enumerate(parties):
            came = () if phase == "keys" else (down[k],)
            own = (words[k],) if phase == "masked" else ()
            message = getattr(party, phase)(*came, *own)
            if phase == "masked":
                sent.append(coding.decode(from_words(message.vector)))
            server.take(k, message)
        down = dict(server.close())
    return sent, coding.decode(from_words(server.sum())) / len(names)
