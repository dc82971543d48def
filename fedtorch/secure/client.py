"""A client's half of a secure sum, as a state machine."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from fedtorch.secure import shamir, streams
from fedtorch.secure.primitives import KEY, KeyPair, box, commit, derive, unbox
from fedtorch.secure.protocol import (
    BOX,
    PHASES,
    Boxes,
    Confirmation,
    Confirmations,
    Keys,
    Masked,
    Opened,
    Roll,
    Sign,
    Survivors,
    Verify,
    checked,
    distinct,
    keys_stated,
    survivors_stated,
)
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import Terms, as_places, ring


class SecureClient:
    """One client in one attempt. Its keys are made with it, and are nowhere else.

    Each method is called once, in the order of ``PHASES``. Whatever is wrong raises Refused, and ends it.
    """

    def __init__(
        self,
        terms: Terms,
        place: int,
        sign: Sign,
        verify: Verify,
        *,
        confirms: Callable[[tuple[int, ...]], str | None] = lambda places: None,
        random: shamir.Random = secrets,
    ) -> None:
        """``confirms``: why this list of survivors is not to be signed (the replay rule), or None.

        Raises Refused for terms that nobody should accept.
        """
        terms.check()
        if not 0 <= place < len(terms.members):
            raise Refused("terms", "this client is not in the roster")
        self.terms, self.place, self.phase = terms, place, PHASES[0]
        self._sign, self._verify, self._confirms = sign, verify, confirms
        self._random = random
        self._box, self._mask = KeyPair(random.token_bytes(KEY)), KeyPair(random.token_bytes(KEY))
        self._seed = random.token_bytes(KEY)
        self._own = Keys(self._box.public, self._mask.public, commit(terms.context, self._seed))
        self._keys: dict[int, Keys] = {}
        self._shared: dict[int, bytes] = {}
        """What the box keys of two have in common: keys of both ways are derived of it."""
        self._near: list[int] = []
        """Who shares masks with this client, and holds shares of its secrets beside itself."""
        self._held: dict[int, tuple[bytes, bytes]] = {}
        """Shares of each one's seed and mask key."""
        self._survivors: tuple[int, ...] = ()

    def keys(self) -> Keys:
        """Public keys of this attempt, signed."""
        with self._turn("keys"):
            own = self._own
            signature = self._sign(keys_stated(self.terms, own))
            self._own = Keys(own.box, own.mask, own.commitment, signature)
            return self._own

    def shares(self, roll: Roll) -> Boxes:
        """Shares of one's secrets, sealed for each neighbour."""
        with self._turn("shares"):
            places = as_places(sorted(roll.keys), self.terms, "the roll")
            if roll.keys.get(self.place) != self._own:
                raise Refused("keys", "the roll has other keys of this client than it sent")
            for j in places:
                if j != self.place:
                    checked(roll.keys[j], j, self.terms, self._verify)
            distinct(roll.keys)
            self._keys = dict(roll.keys)
            self._near = ring(self.terms, {k: v.body for k, v in roll.keys.items()})[self.place]
            self._enough(1 + len(self._near), "sent keys")
            return Boxes(self._sealed())

    def masked(self, delivery: Boxes, vector: np.ndarray) -> Masked:
        """One's vector under masks that are shared with whoever sent a box.

        ``vector``: words mod 2^width, [size]; it is not written on.
        """
        with self._turn("masked"):
            dtype = np.uint64 if self.terms.width == 64 else np.uint32
            if vector.dtype != dtype or vector.shape != (self.terms.size,):
                raise Refused("message", "the vector is not of the type and size of the terms")
            for j in sorted(delivery.boxes):
                self._unseal(j, delivery.boxes[j])
            self._enough(len(self._held), "sent shares")
            out = vector.copy()
            streams.add(out, self._masks())
            return Masked(out)

    def confirm(self, survivors: Survivors) -> Confirmation:
        """A signature under the list of who is in the sum."""
        with self._turn("confirm"):
            places = as_places(survivors.places, self.terms, "the list of survivors")
            if self.place not in places:
                raise Refused("survivors", "the list of survivors leaves this client out")
            near = {*places} & {self.place, *self._near}
            if not near <= self._held.keys() or not {*places} <= self._keys.keys():
                raise Refused("survivors", "the list of survivors has somebody who sent no shares")
            self._enough(len(near), "sent a masked vector")
            if why := self._confirms(places):
                raise Refused("replay", why)
            self._survivors = places
            return Confirmation(self._sign(survivors_stated(self.terms, places)))

    def open(self, confirmations: Confirmations) -> Opened:
        """Shares that let the server take off the masks of these survivors, and of nobody else."""
        with self._turn("open"):
            near = {*self._survivors} & {*self._near}
            stated = survivors_stated(self.terms, self._survivors)
            others = confirmations.signatures.keys() - {self.place}
            if not others <= near:
                raise Refused("message", "a confirmation is of nobody who is in the sum")
            for j in sorted(others):
                if not self._verify(j, stated, confirmations.signatures[j]):
                    why = f"{self._name(j)} has not signed the list of survivors that came here"
                    raise Refused("signature", why, j)
            self._enough(1 + len(others), "signed the list of survivors")
            alive, held = {*self._survivors}, self._held
            self._held = {}
            # one of the two of each: both would open the vector of whoever is late, and not out
            return Opened(
                {j: seed for j, (seed, _) in held.items() if j in alive},
                {j: mask for j, (_, mask) in held.items() if j not in alive},
            )

    @contextmanager
    def _turn(self, phase: str) -> Iterator[None]:
        was, self.phase = self.phase, "done"
        if was != phase:
            raise Refused(
                "phase", f"asked for {phase} where {was} is due: each is given once, in its order"
            )
        yield
        self.phase = PHASES[PHASES.index(phase) + 1]

    def _sealed(self) -> dict[int, bytes]:
        holders = [self.place, *self._near]
        seeds, masks = (
            shamir.shares(int.from_bytes(s, "big"), self.terms.threshold, holders, self._random)
            for s in (self._seed, self._mask.secret)
        )
        both = {k: (shamir.to_bytes(seeds[k]), shamir.to_bytes(masks[k])) for k in holders}
        self._held = {self.place: both[self.place]}
        sealed = {}
        for j in self._near:
            key, about = self._lock(self.place, j)
            sealed[j] = box(key, b"".join(both[j]), about)
        return sealed

    def _unseal(self, j: int, sealed: bytes) -> None:
        if j not in self._near or len(sealed) != BOX:
            raise Refused("message", "a box is of nobody near, or of a wrong size")
        key, about = self._lock(j, self.place)
        try:
            plain = unbox(key, sealed, about)
            seed, mask = plain[: shamir.SIZE], plain[shamir.SIZE :]
            shamir.from_bytes(seed), shamir.from_bytes(mask)
        except Refused as e:
            raise Refused(e.kind, f"{self._name(j)}: {e}", j) from e
        self._held[j] = seed, mask

    def _masks(self) -> list[tuple[bytes, int]]:
        context = self.terms.context
        keys = [(derive(self._seed, "self", context), 1)]
        for j in sorted(self._held.keys() - {self.place}):
            shared = self._mask.agree(self._keys[j].mask)
            keys.append((derive(shared, "pair", context), 1 if j > self.place else -1))
        return keys

    def _enough(self, count: int, what: str) -> None:
        if count < self.terms.threshold:
            raise Refused("few", f"{count} {what}, and {self.terms.threshold} are needed")

    def _lock(self, sender: int, receiver: int) -> tuple[bytes, bytes]:
        """Key of the box that goes one way between two, and what it is sealed about."""
        other = receiver if sender == self.place else sender
        way = f"box {sender}>{receiver}"
        if other not in self._shared:
            self._shared[other] = self._box.agree(self._keys[other].box)
        context = self.terms.context
        return derive(self._shared[other], way, context), context + way.encode()

    def _name(self, place: int) -> str:
        return self.terms.members[place].name
