"""The secure sum: right for whoever drops out, refused by name for whatever goes wrong, and never wrong."""

import hashlib
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtorch.secure import shamir, streams
from fedtorch.secure.client import SecureClient
from fedtorch.secure.primitives import KeyPair, derive
from fedtorch.secure.protocol import (
    PHASES,
    Boxes,
    Confirmation,
    Confirmations,
    Keys,
    Masked,
    Opened,
    Roll,
    Survivors,
)
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import Terms
from fedtorch.secure.server import SecureServer
from secure_rounds import Fixed, Round, sign, terms, verify

LATE = PHASES[1:5]


def settled(n):
    return [(n, t, k) for t in range(n // 2 + 1, n + 1) for k in range(n - t + 2)]


@pytest.mark.parametrize(
    ("n", "t", "dropped"), [case for n in range(3, 8) for case in settled(n)], ids=str
)
def test_the_sum_is_exact_for_whoever_drops_out(n, t, dropped):
    for first, phase in enumerate(LATE if dropped else LATE[:1]):
        # each drops out in the next phase; before the masked vectors, and after
        late = {(first + 2 * k) % n: LATE[(first + k) % 4] for k in range(dropped)}
        late = late if len(late) == dropped else {k: phase for k in range(dropped)}
        width = 64 if first % 2 else 32
        this = Round(terms(n, threshold=t, width=width), gone=late)
        if dropped > n - t:
            with pytest.raises(Refused, match="nothing is summed") as e:
                this.run()
            assert e.value.kind == "few"
            with pytest.raises(Refused, match="not open"):
                this.server.sum()
            continue
        assert np.array_equal(this.run(), this.due())
        assert this.server.late == late
        out = {k for k, phase in late.items() if phase in ("shares", "masked")}
        assert this.server.survivors == tuple(k for k in range(n) if k not in out)


@pytest.mark.parametrize("late", [{}, {3: "shares"}, {3: "masked", 11: "open"}], ids=str)
def test_a_ring_of_neighbours_sums_the_same(late):
    this = Round(terms(13, neighbours=6, threshold=4), gone=late)
    assert np.array_equal(this.run(), this.due())
    boxes = {place: sent for phase, place, sent in this.seen if phase == "shares"}
    assert {len(b.boxes) for b in boxes.values()} == {6}


def test_a_ring_that_loses_one_clients_neighbours_is_not_opened():
    this = Round(terms(13, neighbours=4, threshold=4))
    this.phase("keys")
    this.phase("shares")
    this.gone = dict.fromkeys(this.server._near[0][:2], "masked")
    with pytest.raises(Refused, match="nothing is summed"):
        this.phase("masked")


def test_one_masked_vector_says_nothing():
    this = Round(terms(3, size=1 << 14))
    this.run()
    masked = [sent.vector for phase, _, sent in this.seen if phase == "masked"]
    for vector in masked:
        counts = np.bincount(vector.view(np.uint8), minlength=256)
        expected = vector.nbytes / 256
        chi = float(((counts - expected) ** 2 / expected).sum())
        assert 170 < chi < 350  # 255 degrees of freedom: 1e-5 on either side
    # of any two the third's masks are left
    two = (masked[0] + masked[1]).view(np.uint8)
    assert len({*two[:64].tolist()}) > 30


@pytest.mark.parametrize(
    "change",
    [
        dict(round=4),
        dict(attempt=bytes(16)),
        dict(task=bytes(32)),
        dict(run="other"),
        dict(scale=999),
    ],
    ids=lambda change: next(iter(change)),
)
def test_masks_of_the_same_keys_differ_by_context(change):
    """Fixed keys stand for a pair that is used twice by mistake: no mask is."""
    first, second = Round(terms(3)), Round(terms(3, **change))
    for this in (first, second):
        this.run()
    at = {(phase, place): sent for phase, place, sent in first.seen}
    for phase, place, sent in second.seen:
        if phase == "masked":
            own = first.words[place]
            assert not np.array_equal(sent.vector - own, at[phase, place].vector - own)
    # and keys are drawn anew for each attempt
    one, two = (SecureClient(terms(3), 0, lambda s: b"", verify).keys() for _ in range(2))
    assert len({one.box, one.mask, one.commitment, two.box, two.mask, two.commitment}) == 6


# planted bugs: each is a build that one of these must catch


class AllAdd(SecureClient):
    """The sign of a pair: both add."""

    def _masks(self):
        return [(key, 1) for key, _ in super()._masks()]


class Bare(SecureClient):
    """No mask of its own."""

    def _masks(self):
        return super()._masks()[1:]


@pytest.mark.parametrize("build", [AllAdd, Bare])
def test_a_wrong_mask_spoils_the_sum(build):
    this = Round(terms(5), clients=build)
    assert not np.array_equal(this.run(), this.due())


def unmasked_by_pairs(this, place):
    """A masked vector without the masks that its mask key gives: what a late vector would show."""
    client = this.clients[place]
    (vector,) = (s.vector for p, k, s in this.seen if (p, k) == ("masked", place))
    found = vector.copy()
    for j, keys in client._keys.items():
        if j != place:
            shared = KeyPair(client._mask.secret).agree(keys.mask)
            key = derive(shared, "pair", this.terms.context)
            streams.add(found, [(key, -1 if j > place else 1)])
    return found


def test_whoever_knows_the_mask_key_alone_sees_no_vector():
    for build, seen in ((SecureClient, False), (Bare, True)):
        this = Round(terms(5), clients=build)
        for phase in PHASES[:3]:
            this.phase(phase)
        assert np.array_equal(unmasked_by_pairs(this, 2), this.words[2]) == seen


class Blind(Terms):
    """A context without the task's digest."""

    @property
    def context(self):
        return replace(terms(len(self.members)), task=bytes(32)).context


def test_two_models_do_not_add_up():
    """Pasquini et al. 2022: whoever is sent another model has masks that do not cancel."""
    other = hashlib.sha256(b"a model that makes the others' updates vanish").digest()
    this = Round(terms(5), owns={2: terms(5, task=other)})
    with pytest.raises(Refused, match="has not signed its keys for this task") as e:
        this.run()
    assert (e.value.kind, e.value.place) == ("signature", 2)
    # a server that lets it pass is refused by the other sites
    this = Round(terms(5), owns={2: terms(5, task=other)})
    this.server._verify = lambda *args: True
    with pytest.raises(Refused, match="site2 has not signed its keys") as e:
        this.run()
    # and where every signature held, the masks would not cancel
    for kind, right in ((Terms, False), (Blind, True)):
        base, own = (kind(**vars_of(t)) for t in (terms(5), terms(5, task=other)))
        this = Round(base, owns={2: own})
        for party in (this.server, *this.clients):
            party._verify = lambda *args: True
        assert np.array_equal(opened(this), this.due()) == right


def vars_of(terms):
    return {f.name: getattr(terms, f.name) for f in fields(terms)}


def opened(this):
    """The sum, or noise where a box that does not open ends the attempt first."""
    try:
        return this.run()
    except Refused as e:
        assert e.kind in ("box", "few", "shares")
        return np.zeros(0)


def asks_for_both(this):
    """A server that has a list signed, and then asks for another without one who is in it."""
    for phase in PHASES[:4]:
        this.phase(phase)
    client = this.clients[0]
    opened = client.open(this.down[0])
    signed = client.confirm(Survivors((0, 1, 2, 3)))
    return opened, signed


def test_no_client_opens_both_shares_of_anybody():
    this = Round(terms(5))
    with pytest.raises(Refused, match="given once, in its order") as e:
        asks_for_both(this)
    assert e.value.kind == "phase"
    this = Round(terms(5), gone={4: "masked"})
    this.run()
    for phase, _, sent in this.seen:
        if phase == "open":
            assert {*sent.seeds} == {0, 1, 2, 3} and {*sent.masks} == {4}


def test_a_second_list_of_survivors_is_not_signed():
    this = Round(terms(5))
    for phase in PHASES[:3]:
        this.phase(phase)
    this.clients[0].confirm(Survivors((0, 1, 2, 3)))
    with pytest.raises(Refused, match="asked for confirm where open is due"):
        this.clients[0].confirm(Survivors((0, 1, 2, 3, 4)))
    # others who signed the whole list are no confirmation of the short one
    this = Round(terms(5))
    for phase in PHASES[:4]:
        this.phase(phase)
    fooled = Round(terms(5))
    for phase in PHASES[:3]:
        fooled.phase(phase)
    fooled.clients[0].confirm(Survivors((0, 1, 2, 3)))
    others = {k: v for k, v in this.down[0].signatures.items() if k < 4}
    with pytest.raises(Refused, match="has not signed the list of survivors that came here"):
        fooled.clients[0].open(Confirmations(others))


@pytest.mark.parametrize("t", [0, 2, 6], ids=str)
def test_a_threshold_that_one_list_in_two_could_reach_is_refused(t):
    for kind in (lambda t: SecureClient(t, 0, None, verify), lambda t: SecureServer(t, verify)):
        with pytest.raises(Refused, match="a threshold of") as e:
            kind(terms(5, threshold=t))
        assert e.value.kind == "terms"


def test_a_threshold_of_another_roster_is_another_context():
    this = Round(terms(5), owns={1: terms(5, threshold=3)})
    with pytest.raises(Refused, match="site1 has not signed its keys"):
        this.run()


def test_a_key_that_is_there_twice_is_refused():
    this = Round(terms(5))
    this.clients[3] = SecureClient(
        this.terms, 3, lambda s: sign(3, s), verify, random=Fixed("client 1 of seed 0")
    )
    with pytest.raises(Refused, match="there twice") as e:
        this.run()
    assert e.value.kind == "keys"
    # a server that does not look passes it on to clients that do
    this.server._keys, keys = {}, {k: c._own for k, c in enumerate(this.clients)}
    keys[4] = this.clients[4].keys()
    with pytest.raises(Refused, match="there twice"):
        this.clients[0].shares(Roll(keys))


def changed(at, phase, change):
    """Who tampers in one phase of one way."""

    def tamper(way, now, place, message):
        return change(place, message) if (way, now) == (at, phase) else message

    return tamper


def swapped(place, roll):
    """A server's own key in the place of a client's."""
    keys = dict(roll.keys)
    keys[1] = replace(keys[1], mask=KeyPair(b"s" * 32).public)
    return Roll(keys) if place == 0 else roll


def unsigned(place, roll):
    keys = dict(roll.keys)
    keys[1] = replace(keys[1], signature=b"")
    return Roll(keys) if place == 0 else roll


def another(place, roll):
    keys = dict(roll.keys)
    keys[0] = keys[1]
    return Roll(keys) if place == 0 else roll


@pytest.mark.parametrize(
    ("phase", "change", "kind", "words"),
    [
        ("shares", swapped, "signature", "site1 has not signed its keys"),
        ("shares", unsigned, "signature", "site1 has not signed its keys"),
        ("shares", another, "keys", "other keys of this client than it sent"),
        ("shares", lambda k, m: Roll({j: m.keys[j] for j in (0, 1, 2) if k < 3}), "few", "3 sent keys"),
        ("shares", lambda k, m: Roll(m.keys | {9: m.keys[1]}), "message", "places of the roster"),
        ("masked", lambda k, m: Boxes({j: b for j, b in m.boxes.items() if j < 2}), "few", "sent shares"),
        ("masked", lambda k, m: Boxes({**m.boxes, 4: m.boxes[1]} if k == 0 else m.boxes), "box", "site4"),
        ("masked", lambda k, m: Boxes({**m.boxes, 9: b""}), "message", "nobody near"),
        ("confirm", lambda k, m: Survivors((0, 1, 2)), "few", "3 sent a masked vector"),
        ("confirm", lambda k, m: Survivors((1, 2, 3, 4)), "survivors", "leaves this client out"),
        ("confirm", lambda k, m: Survivors((0, 1, 2, 3, 5)), "message", "places of the roster"),
        ("confirm", lambda k, m: Survivors((1, 0, 2, 3)), "message", "places of the roster"),
        ("confirm", lambda k, m: Survivors((0, 1, 2, np.int64(3))), "message", "places of the roster"),
        ("open", lambda k, m: Confirmations({1: m.signatures[1]} if k == 0 else {}), "few", "signed"),
        ("open", lambda k, m: Confirmations({**m.signatures, 1: b"x"}), "signature", "site1"),
        ("open", lambda k, m: Confirmations({9: b"x"}), "message", "nobody who is in the sum"),
    ],
    ids=[
        "swapped key", "unsigned key", "own key", "few keys", "place", "few boxes", "box of another",
        "box of nobody", "few survivors", "left out", "unknown survivor", "order", "numpy place",
        "few signatures", "forged signature", "signature of nobody",
    ],
)  # fmt: skip
def test_what_a_server_may_not_say_is_refused_by_clients(phase, change, kind, words):
    with pytest.raises(Refused, match=words) as e:
        Round(terms(5), tamper=changed("down", phase, change)).run()
    assert e.value.kind == kind


def test_a_survivor_who_sent_no_shares_is_no_survivor():
    with pytest.raises(Refused, match="somebody who sent no shares") as e:
        Round(
            terms(5),
            gone={4: "shares"},
            tamper=changed("down", "confirm", lambda k, m: Survivors((0, 1, 2, 3, 4))),
        ).run()
    assert e.value.kind == "survivors"


def test_the_replay_rule_is_asked_before_a_list_is_signed():
    asked = []

    def confirms(places):
        asked.append(places)
        return "site0 has opened this round to others before"

    this = Round(terms(5))
    this.clients[0]._confirms = confirms
    with pytest.raises(Refused, match="has opened this round") as e:
        this.run()
    assert (e.value.kind, asked) == ("replay", [(0, 1, 2, 3, 4)])


@pytest.mark.parametrize(
    ("phase", "change", "kind"),
    [
        ("keys", lambda m: replace(m, mask=b"short"), "message"),
        ("keys", lambda m: replace(m, signature=b"none"), "signature"),
        ("shares", lambda m: Boxes({**m.boxes, 9: b""}), "message"),
        ("shares", lambda m: Boxes({k: b[1:] for k, b in m.boxes.items()}), "message"),
        ("masked", lambda m: Masked(m.vector[1:]), "message"),
        ("masked", lambda m: Masked(m.vector.astype(np.uint64)), "message"),
        ("masked", lambda m: Confirmation(b""), "phase"),
        ("confirm", lambda m: Confirmation(b"x"), "signature"),
        ("open", lambda m: Opened(m.seeds, {0: b""}), "message"),
        ("open", lambda m: Opened(dict.fromkeys(m.seeds, b"\xff" * 33), m.masks), "share"),
    ],
    ids=[
        "short key", "unsigned", "box of nobody", "short box", "short vector", "other width", "other phase",
        "another list", "other shares", "no share",
    ],
)  # fmt: skip
def test_what_a_client_sends_wrong_is_refused_and_names_it(phase, change, kind):
    def tamper(way, now, place, message):
        return change(message) if (way, now, place) == ("up", phase, 2) else message

    this = Round(terms(5), tamper=tamper)
    with pytest.raises(Refused) as e:
        this.run()
    assert e.value.kind == kind
    # it counts as not sent, and the others go on without it
    this = Round(terms(5), tamper=tamper)
    take = this.server.take

    def forgiving(place, message):
        try:
            take(place, message)
        except Refused:
            assert place == 2

    this.server.take = forgiving
    assert np.array_equal(this.run(), this.due())
    assert this.server.late == {2: phase}


def test_what_was_sent_once_is_not_taken_again():
    this = Round(terms(5))
    own = this.clients[0].keys()
    this.server.take(0, own)
    with pytest.raises(Refused, match="has sent this before"):
        this.server.take(0, own)
    with pytest.raises(Refused, match="asked for keys where shares is due"):
        this.clients[0].keys()


def lying(liar, owners):
    def tamper(way, phase, place, message):
        if (way, phase, place) != ("up", "open", liar):
            return message
        wrong = shamir.to_bytes(7)
        return Opened(
            {k: wrong if k in owners else v for k, v in message.seeds.items()},
            {k: wrong if k in owners else v for k, v in message.masks.items()},
        )

    return tamper


@pytest.mark.parametrize("owners", [{0}, {4}, {0, 1, 2, 3, 4}], ids=["seed", "mask", "all"])
def test_a_wrong_share_names_the_liar_and_the_sum_is_right(owners):
    this = Round(terms(6, threshold=4), gone={4: "masked"}, tamper=lying(1, owners))
    assert np.array_equal(this.run(), this.due())
    assert {*this.server.liars} == {1} and this.server.liars[1] in owners


def test_wrong_shares_that_nobody_can_spare_end_the_round_without_a_sum():
    this = Round(terms(5), gone={4: "masked"}, tamper=lying(1, {0}))
    with pytest.raises(Refused, match="the shares of site0 do not give") as e:
        this.run()
    assert e.value.kind == "shares"
    with pytest.raises(Refused, match="not open"):
        this.server.sum()
    with pytest.raises(Refused, match="somebody who opened shares gave wrong ones"):
        Round(terms(5), gone={4: "masked"}, tamper=lying(1, {*range(5)})).run()


def test_a_client_that_deals_wrong_shares_is_named():
    class Dealer(SecureClient):
        def _sealed(self):
            self._seed = b"another seed than was committed to"[:32]
            return super()._sealed()

    this = Round(terms(5))
    dealer = Dealer(this.terms, 2, lambda s: sign(2, s), verify)
    this.clients[2] = dealer
    with pytest.raises(
        Refused, match="the shares of site2 do not give what was committed to: whoever dealt them"
    ):
        this.run()


# the same bytes in every version, so that two of them interoperate
TRANSCRIPT = {
    32: "48c8e344cae7670a9325b7d2860c8335b6da53a490c332e7996ab581ee026937",
    64: "9089d97208d8696a5ef1ab45732b064e03f02ac7d94485d8ed1a08a91f6e111d",
}


def flat(message):
    """All that a message says, in order."""
    if is_dataclass(message):
        return b"".join(flat(getattr(message, f.name)) for f in fields(message))
    if isinstance(message, np.ndarray):
        return message.tobytes()
    if isinstance(message, dict):
        return b"".join(b"%d:" % k + flat(v) for k, v in sorted(message.items()))
    return bytes(message)


@pytest.mark.parametrize("width", [32, 64], ids=str)
def test_a_recorded_transcript(width):
    this = Round(terms(6, threshold=4, width=width), gone={1: "masked", 3: "open"}, seed=1)
    assert np.array_equal(this.run(), this.due())
    said = hashlib.sha256(b"".join(flat(sent) for _, _, sent in this.seen)).hexdigest()
    assert said == TRANSCRIPT[width]


# whatever goes by is changed: never a wrong sum, always a named refusal

KINDS = {
    "terms", "phase", "message", "keys", "signature", "box", "few", "survivors", "share", "shares",
}  # fmt: skip


@dataclass
class Meddler:
    """Changes some messages, as ``draw`` says, but for a client's own vector, which is its own."""

    draw: object
    rate: int

    def __post_init__(self):
        self.old = {}

    def __call__(self, way, phase, place, message):
        kind = type(message)
        before = self.old.setdefault((way, kind), [])
        before.append(message)
        if kind is Masked or self.draw(st.integers(0, self.rate)) != 0:
            return message
        how = self.draw(st.sampled_from(["drop", "replay", "bytes", "places"]))
        if how == "drop":
            return None if way == "up" else message
        if how == "replay":
            return self.draw(st.sampled_from(before))
        name = self.draw(st.sampled_from([f.name for f in fields(message)]))
        return replace(message, **{name: self.changed(getattr(message, name), how)})

    def changed(self, value, how):
        if isinstance(value, bytes):
            cut = self.draw(st.integers(0, len(value)))
            flip = bytes([value[cut] ^ 1]) if cut < len(value) else b"!"
            return self.draw(st.sampled_from([value[:cut], value[:cut] + flip + value[cut + 1 :]]))
        if isinstance(value, Keys):
            name = self.draw(st.sampled_from([f.name for f in fields(value)]))
            return replace(value, **{name: self.changed(getattr(value, name), "bytes")})
        if isinstance(value, tuple):
            return tuple(self.draw(st.permutations(value)))[: self.draw(st.integers(0, len(value)))]
        if not value:
            return value
        one, two = (self.draw(st.sampled_from(sorted(value))) for _ in range(2))
        if how == "bytes":
            return {**value, one: self.changed(value[one], how)}
        return self.draw(
            st.sampled_from(
                [{**value, one: value[two]}, {k: v for k, v in value.items() if k != one}]
            )
        )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_never_a_wrong_sum(data):
    n = data.draw(st.integers(3, 5))
    meddler = Meddler(data.draw, data.draw(st.sampled_from([3, 12, 30])))
    this = Round(terms(n, size=3), tamper=meddler)
    try:
        found = this.run()
    except Refused as e:
        assert e.kind in KINDS and len(str(e)) > 10
        with pytest.raises(Refused):
            this.server.sum()
    else:
        assert np.array_equal(found, this.due())
