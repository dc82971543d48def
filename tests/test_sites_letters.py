"""Messages of a secure sum on the wire: they come back as they were, and nothing else comes through."""

import random

import numpy as np
import pytest
import torch

from fedtorch.engines import wire
from fedtorch.engines.wire import Message, MessageError
from fedtorch.secure.protocol import (
    Boxes,
    Confirmation,
    Confirmations,
    Keys,
    Masked,
    Opened,
    Roll,
    Survivors,
)
from fedtorch.secure.roster import Member, Terms
from fedtorch.sites import letters

KEYS = Keys(b"\x01" * 32, b"\x02" * 32, b"\x03" * 32, b"signature")
UP = {
    "keys": KEYS,
    "shares": Boxes({2: b"xy" * 41, 0: b"ab" * 41}),
    "masked": Masked(np.array([0, 2**63, 2**64 - 1], np.uint64)),
    "confirm": Confirmation(b"another signature"),
    "open": Opened({0: b"s" * 33, 1: b"t" * 33}, {}),
}
DOWN = {
    "shares": Roll({0: KEYS, 3: Keys(b"\x04" * 32, b"\x05" * 32, b"\x06" * 32, b"s")}),
    "masked": Boxes({1: b"z" * 82}),
    "confirm": Survivors((0, 1, 3)),
    "open": Confirmations({1: b"one", 0: b"", 3: b"three"}),
}
MEMBERS = (
    Member("north", b"\x07" * 32),
    Member("south", b"\x08" * 32),
    Member("west", b"\x09" * 32),
)
TERMS = Terms(
    run="r", round=0, attempt=b"\x0a" * 16, task=b"\x0b" * 32, members=MEMBERS, threshold=3, width=64,
    range=1.0, scale=4, size=3,
)  # fmt: skip


def carried(groups):
    return wire.decode(wire.encode(Message("x", {}, groups)))


def same(a, b):
    if isinstance(a, Masked):
        return a.vector.dtype == b.vector.dtype and np.array_equal(a.vector, b.vector)
    return a == b


@pytest.mark.parametrize("phase", UP)
def test_what_a_site_sends_comes_back(phase):
    assert same(letters.read_up(phase, carried(letters.up_groups(UP[phase])), 64), UP[phase])


@pytest.mark.parametrize("phase", DOWN)
def test_what_the_server_sends_comes_back(phase):
    assert letters.read_down(phase, carried(letters.down_groups(DOWN[phase], {}))) == DOWN[phase]


def test_half_words_travel_as_half_the_bytes():
    vector = np.array([0, 2**31, 2**32 - 1], np.uint32)
    groups = letters.up_groups(Masked(vector))
    assert sum(t.nbytes for t in groups["secure"].values()) == 12
    found = letters.read_up("masked", carried(groups), 32)
    assert found.vector.dtype == np.uint32 and np.array_equal(found.vector, vector)
    with pytest.raises(MessageError, match="type that was agreed"):
        letters.read_up("masked", carried(groups), 64)


def test_certificates_go_with_the_keys_to_whoever_lacks_them():
    pems = {0: b"-----north", 3: b"-----south"}
    message = carried(letters.down_groups(DOWN["shares"], pems))
    assert letters.certificates(message) == pems
    assert letters.read_down("shares", message) == DOWN["shares"]
    with pytest.raises(MessageError, match="certificates"):
        letters.read_down("masked", message)


def test_terms_come_back_and_odd_ones_do_not():
    facts = letters.terms_facts(TERMS)
    assert letters.read_terms(carried_facts(facts)) == (TERMS.attempt, MEMBERS, 3)
    said = facts["secure"]
    for odd in (
        None,
        [],
        said | {"attempt": "0a"},
        said | {"attempt": 7},
        said | {"threshold": True},
        said | {"threshold": 10**30},
        said | {"members": [["north", "07"]]},
        said | {"members": [["north"]]},
        said | {"members": said["members"] * 400},
        said | {"members": {"north": "07" * 32}},
    ):
        with pytest.raises(MessageError):
            letters.read_terms(carried_facts({"secure": odd}))
    with pytest.raises(MessageError, match="names no roster"):
        letters.read_terms(Message("task"))


def carried_facts(facts):
    return wire.decode(wire.encode(Message("task", facts)))


def spoilt(groups, draw):
    """The same message with one thing wrong, as somebody might send it."""
    groups = {g: dict(t) for g, t in groups.items()}
    group = draw.choice([*groups])
    name = draw.choice([*groups[group]])
    value = groups[group][name]
    match draw.randrange(7):
        case 0:
            del groups[group][name]
        case 1:
            groups[group]["more"] = torch.zeros(2)
        case 2:
            groups["more"] = groups[group]
        case 3:
            groups[group][name] = value.double()
        case 4:
            groups[group][name] = value[None]
        case 5:
            groups[group][name] = torch.cat([value, value, value])
        case 6:
            groups[group][name] = torch.full_like(value, draw.choice([-1, 0, 1, 100]))
    return groups


def test_a_message_of_another_form_is_never_taken_for_one():
    # lists of bytes may still be lists of other bytes: signatures and boxes tell those
    draw, refused = random.Random(0), 0
    for _ in range(60):
        for phase, message in UP.items():
            changed = carried(spoilt(letters.up_groups(message), draw))
            refused += taken(letters.read_up, phase, changed, 64)
        for phase, message in DOWN.items():
            changed = carried(spoilt(letters.down_groups(message, {}), draw))
            refused += taken(letters.read_down, phase, changed)
    assert refused > 300


def taken(read, phase, message, *width):
    try:
        found = read(phase, message, *width)
    except MessageError:
        return 1
    assert type(found) in {type(UP.get(phase)), type(DOWN.get(phase))}
    return 0


@pytest.mark.parametrize("phase", ["done", "keys ", ""])
def test_there_are_no_other_phases(phase):
    for read in (lambda m: letters.read_up(phase, m, 64), lambda m: letters.read_down(phase, m)):
        with pytest.raises(MessageError, match="no phase"):
            read(carried(letters.up_groups(KEYS)))
