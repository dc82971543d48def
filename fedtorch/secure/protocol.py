"""The messages of a secure sum, and what both halves ask of them (Bonawitz et al. 2017, eprint 2017/281).

Five exchanges after training: keys, shares, masked, confirm, open. With ``Terms.neighbours`` it is that of
Bell et al. 2020 (eprint 2020/704). ``client.py`` and ``server.py`` have the halves, message in and message
out. Whoever carries the messages says who sent one; all that it says is checked, and what does not hold is
``Refused``, never summed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedtorch.secure import shamir
from fedtorch.secure.primitives import KEY, TAG, statement
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import Terms, packed

PHASES = ("keys", "shares", "masked", "confirm", "open", "done")
"""What a client sends next, and the server waits for."""

Sign = Callable[[bytes], bytes]
"""Signs with the key of one's own certificate."""
Verify = Callable[[int, bytes, bytes], bool]
"""(place, statement, signature) -> whether the certificate of that place in the roster signed it."""


@dataclass(frozen=True)
class Keys:
    """Up, first: a client's two public keys of this attempt."""

    box: bytes
    mask: bytes
    commitment: bytes
    """Digest of the seed of its own mask."""
    signature: bytes = b""

    @property
    def body(self) -> bytes:
        """What is signed."""
        return self.box + self.mask + self.commitment


@dataclass(frozen=True)
class Roll:
    """Down: everybody's keys, by place."""

    keys: Mapping[int, Keys]


@dataclass(frozen=True)
class Boxes:
    """Up: shares for each neighbour, sealed, by its place. Down: what each of them has sealed for one."""

    boxes: Mapping[int, bytes]


@dataclass(frozen=True)
class Masked:
    """Up: one's vector under its masks."""

    vector: np.ndarray
    """[size], uint64 or uint32."""


@dataclass(frozen=True)
class Survivors:
    """Down: whose vectors are in the sum, in ascending order."""

    places: tuple[int, ...]


@dataclass(frozen=True)
class Confirmation:
    """Up: one's signature under the list of survivors."""

    signature: bytes


@dataclass(frozen=True)
class Confirmations:
    """Down: those of others, by place."""

    signatures: Mapping[int, bytes]


@dataclass(frozen=True)
class Opened:
    """Up: shares, by whose they are; of no one both."""

    seeds: Mapping[int, bytes]
    """Of the seed of a survivor's own mask."""
    masks: Mapping[int, bytes]
    """Of the mask key of one who has dropped out."""


Up = Keys | Boxes | Masked | Confirmation | Opened
Down = Roll | Boxes | Survivors | Confirmations
SENT: dict[str, type] = dict(zip(PHASES, (Keys, Boxes, Masked, Confirmation, Opened), strict=False))
"""What a client sends in each phase."""


BOX = 2 * shamir.SIZE + TAG
"""Bytes of a box."""


def keys_stated(terms: Terms, keys: Keys) -> bytes:
    """What a client signs of its keys."""
    return statement("keys", terms.context, keys.body)


def survivors_stated(terms: Terms, places: tuple[int, ...]) -> bytes:
    """What a client signs of a list of survivors."""
    return statement("confirm", terms.context, packed(places))


def checked(keys: Keys, place: int, terms: Terms, verify: Verify) -> None:
    """Raises Refused for keys of a wrong size, or that the certificate of their place has not signed."""
    name = terms.members[place].name
    if [len(k) for k in (keys.box, keys.mask, keys.commitment)] != [KEY] * 3:
        raise Refused("message", f"the keys of {name} are of a wrong size", place)
    if not verify(place, keys_stated(terms, keys), keys.signature):
        why = f"{name} has not signed its keys for this task, roster and attempt"
        raise Refused("signature", why, place)


def distinct(keys: Mapping[int, Keys]) -> None:
    """Raises Refused where two keys are the same: one of them is somebody else's."""
    found = [key for k in keys.values() for key in (k.box, k.mask)]
    if len({*found}) != len(found):
        raise Refused("keys", "a public key is there twice")
