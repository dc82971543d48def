"""The server's half of a secure sum, as a state machine: it passes on, adds up, and takes masks off."""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from fedtorch.secure import shamir, streams
from fedtorch.secure.opening import Joiner, unjoined
from fedtorch.secure.primitives import KeyPair, commit, derive
from fedtorch.secure.protocol import (
    BOX,
    PHASES,
    SENT,
    Boxes,
    Confirmation,
    Confirmations,
    Down,
    Keys,
    Masked,
    Opened,
    Roll,
    Survivors,
    Up,
    Verify,
    checked,
    distinct,
    survivors_stated,
)
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import Terms, ring


class SecureServer:
    """One attempt: ``take`` what clients send and ``close`` the phase, five times; then ``sum``.

    What one client sends wrong raises Refused in ``take``, and counts as not sent. ``close`` raises Refused
    (kind ``few``) where too few are left; nothing is released then.
    """

    def __init__(self, terms: Terms, verify: Verify) -> None:
        """Raises Refused for terms that no client should accept."""
        terms.check()
        self.terms, self.phase = terms, PHASES[0]
        self._verify = verify
        self.waiting: set[int] = {*range(len(terms.members))}
        """Who has yet to send in this phase, by place."""
        self.late: dict[int, str] = {}
        """Who is out, and in which phase."""
        self.liars: dict[int, int] = {}
        """Who gave a share that does not fit the others', and whose; the sum is right all the same."""
        self.survivors: tuple[int, ...] = ()
        """Whose vectors are in the sum."""
        self._keys: dict[int, Keys] = {}
        self._near: dict[int, list[int]] = {}
        self._boxes: dict[int, Mapping[int, bytes]] = {}
        self._total = np.zeros(terms.size, np.uint64 if terms.width == 64 else np.uint32)
        self._added: set[int] = set()
        self._signed: dict[int, bytes] = {}
        self._opened: dict[int, Opened] = {}

    def take(self, place: int, message: Up) -> None:
        """One client's message of this phase."""
        if not isinstance(message, SENT.get(self.phase, ())):
            raise Refused("phase", f"the round is at {self.phase}, and takes nothing else", place)
        if place not in self.waiting:
            raise Refused("phase", f"{self._name(place)} is out, or has sent this before", place)
        match message:
            case Keys():
                checked(message, place, self.terms, self._verify)
                distinct(self._keys | {place: message})
                self._keys[place] = message
            case Boxes():
                self._take_boxes(place, message.boxes)
            case Masked():
                self._take_vector(place, message.vector)
            case Confirmation():
                self._take_signature(place, message.signature)
            case Opened():
                self._take_opened(place, message)
        self.waiting.discard(place)

    def close(self) -> dict[int, Down]:
        """End the phase without those who are late: what each of the others is sent, by place.

        After the last one the sum is there and nothing is sent.
        """
        if self.phase not in SENT:
            raise Refused("phase", "the round is over")
        phase, self.phase = self.phase, "failed"
        self.late |= dict.fromkeys(self.waiting, phase)
        end = {
            "keys": self._roll,
            "shares": self._delivery,
            "masked": self._list,
            "confirm": self._confirmed,
            "open": self._open,
        }
        down = end[phase]()
        self.phase, self.waiting = PHASES[PHASES.index(phase) + 1], {*down}
        return down

    def sum(self) -> np.ndarray:
        """The sum of the survivors' vectors, words mod 2^width; raises Refused before it is open."""
        if self.phase != "done":
            raise Refused("phase", "the sum is not open yet")
        return self._total

    def _roll(self) -> dict[int, Down]:
        self._near = ring(self.terms, {k: v.body for k, v in self._keys.items()})
        self._enough(self._keys, self._keys, "sent keys")
        return dict.fromkeys(self._keys, Roll(self._keys))

    def _delivery(self) -> dict[int, Down]:
        self._enough(self._boxes, self._boxes, "sent shares")
        return {
            i: Boxes({j: self._boxes[j][i] for j in self._near[i] if j in self._boxes})
            for i in self._boxes
        }

    def _list(self) -> dict[int, Down]:
        self._enough(self._added, self._boxes, "sent a masked vector")
        self.survivors = tuple(sorted(self._added))
        return dict.fromkeys(self.survivors, Survivors(self.survivors))

    def _confirmed(self) -> dict[int, Down]:
        self._enough(self._signed, self._boxes, "signed the list of survivors")
        return {
            i: Confirmations({j: self._signed[j] for j in self._near[i] if j in self._signed})
            for i in self._signed
        }

    def _enough(self, here: Collection[int], sharing: Collection[int], what: str) -> None:
        """Raises Refused where fewer than the threshold hold shares of somebody and are still here."""
        fewest = min((len({i, *self._near[i]} & {*here}) for i in sharing), default=0)
        if fewest < self.terms.threshold:
            why = f"{fewest} {what}, and {self.terms.threshold} are needed: nothing is summed"
            raise Refused("few", why)

    def _open(self) -> dict[int, Down]:
        self._enough(self._opened, self._boxes, "opened shares")
        joiner, lost, keys = Joiner(self.terms.threshold), [], list[tuple[bytes, int]]()
        for owner in self._boxes:
            alive, own = owner in self._added, self._keys[owner]
            given = {
                h: (o.seeds if alive else o.masks)[owner]
                for h, o in self._opened.items()
                if h == owner or h in self._near[owner]
            }
            secret = joiner.join(owner, given, self._committed(own) if alive else _is_key(own))
            if secret is None:
                lost.append(self._name(owner))
            elif alive:
                keys.append((derive(secret, "self", self.terms.context), -1))
            else:
                keys += self._left_over(owner, KeyPair(secret))
        self.liars = joiner.liars
        if lost:
            raise unjoined(lost, len(lost) == len(self._boxes))
        streams.add(self._total, keys)
        return {}

    def _committed(self, own: Keys) -> Callable[[bytes], bool]:
        return lambda seed: commit(self.terms.context, seed) == own.commitment

    def _left_over(self, gone: int, pair: KeyPair) -> list[tuple[bytes, int]]:
        """Masks that survivors share with one who has gone, taken off."""
        alive = [j for j in self._near[gone] if j in self._added]
        shared = {j: pair.agree(self._keys[j].mask) for j in alive}
        # j added the stream if the other stands behind it in the roster, and took it off if before
        return [
            (derive(raw, "pair", self.terms.context), -1 if gone > j else 1)
            for j, raw in shared.items()
        ]

    def _take_boxes(self, place: int, boxes: Mapping[int, bytes]) -> None:
        if sorted(boxes) != self._near[place] or {*map(len, boxes.values())} != {BOX}:
            raise Refused("message", f"{self._name(place)} sent other boxes than are due", place)
        self._boxes[place] = boxes

    def _take_vector(self, place: int, vector: np.ndarray) -> None:
        total = self._total
        if vector.dtype != total.dtype or vector.shape != total.shape:
            raise Refused("message", f"{self._name(place)} sent another vector than is due", place)
        np.add(total, vector, out=total)
        self._added.add(place)

    def _take_signature(self, place: int, signature: bytes) -> None:
        stated = survivors_stated(self.terms, self.survivors)
        if not self._verify(place, stated, signature):
            raise Refused("signature", f"{self._name(place)} signed another list", place)
        self._signed[place] = signature

    def _take_opened(self, place: int, message: Opened) -> None:
        owners = {j for j in (place, *self._near[place]) if j in self._boxes}
        alive = owners & {*self.survivors}
        if message.seeds.keys() != alive or message.masks.keys() != owners - alive:
            raise Refused("message", f"{self._name(place)} opened other shares than are due", place)
        for share in (*message.seeds.values(), *message.masks.values()):
            shamir.from_bytes(share)
        self._opened[place] = message

    def _name(self, place: int) -> str:
        return self.terms.members[place].name


def _is_key(own: Keys) -> Callable[[bytes], bool]:
    return lambda secret: KeyPair(secret).public == own.mask
