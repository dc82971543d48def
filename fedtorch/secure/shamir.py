"""Secrets of 32 bytes in shares, any ``threshold`` of which give them back (Shamir 1979)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from fedtorch.secure.refused import Refused

PRIME = 2**256 + 297
"""The smallest prime above every secret."""
SIZE = 33
"""Bytes of a share."""


class Random(Protocol):
    """Where secrets come from: Python's module ``secrets``."""

    def token_bytes(self, nbytes: int, /) -> bytes:
        """So many random bytes."""

    def randbelow(self, exclusive_upper_bound: int, /) -> int:
        """A whole number from 0 to below the bound, each as likely."""


def shares(
    secret: int, threshold: int, places: Iterable[int], random: Random, prime: int = PRIME
) -> dict[int, int]:
    """A share for each place, by place: values of a polynomial of degree threshold - 1 at place + 1.

    Raises Refused where a place is not one, or there are fewer than the threshold.
    """
    found = [int(k) for k in places]  # a number of NumPy's would overflow
    if len({*found}) != len(found) or not 1 <= threshold <= len(found):
        raise Refused("threshold", f"{threshold} of {len(found)} shares are no threshold")
    if not (0 <= secret < prime and all(0 <= k < prime - 1 for k in found)):
        raise Refused("share", "a secret or a place is outside the field")
    terms = [secret, *(random.randbelow(prime) for _ in range(threshold - 1))][::-1]
    return {k: _value(terms, k + 1, prime) for k in found}


def _value(terms: Sequence[int], x: int, prime: int) -> int:
    y = 0
    for term in terms:
        y = (y * x + term) % prime
    return y


def weights(places: Sequence[int], at: int = 0, prime: int = PRIME) -> list[int]:
    """What shares of these places are multiplied by and added, to give the polynomial's value at ``at``.

    They hang on the set of places alone. Raises Refused where a place is there twice.
    """
    xs = [int(k) + 1 for k in places]
    if len({x % prime for x in xs}) != len(xs) or not all(0 < x < prime for x in xs):
        raise Refused("share", "two shares of one place give no secret")
    found = []
    for x in xs:
        above = below = 1
        for other in xs:
            if other != x:
                above = above * (at - other) % prime
                below = below * (x - other) % prime
        found.append(above * pow(below, -1, prime) % prime)
    return found


def join(shares: Mapping[int, int], threshold: int, prime: int = PRIME) -> int:
    """The secret, from the first ``threshold`` of the shares.

    Raises Refused where there are fewer, or a share is no number of the field.
    """
    if len(shares) < threshold:
        raise Refused("few", f"{len(shares)} shares, and {threshold} are needed")
    taken = [*shares.items()][:threshold]
    return combine(weights([k for k, _ in taken], prime=prime), [v for _, v in taken], prime)


def combine(weights: Sequence[int], shares: Sequence[int], prime: int = PRIME) -> int:
    """The sum of shares, each times its weight."""
    if not all(0 <= v < prime for v in shares):
        raise Refused("share", "a share is outside the field")
    return sum(w * v for w, v in zip(weights, shares, strict=True)) % prime


def to_bytes(share: int) -> bytes:
    """A share as it travels."""
    return share.to_bytes(SIZE, "big")


def from_bytes(data: bytes) -> int:
    """A share that came; raises Refused where it is none."""
    found = int.from_bytes(data, "big")
    if len(data) != SIZE or found >= PRIME:
        raise Refused("share", "a share is no number of the field")
    return found
