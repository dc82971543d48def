"""Messages of a secure sum as messages of the wire, and back; what comes is looked at first."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch.engines.wire import Message, MessageError, short
from fedtorch.secure.primitives import KEY
from fedtorch.secure.protocol import (
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
)
from fedtorch.secure.roster import ATTEMPT, DIGEST, Member, Terms
from fedtorch.types import Params

MOST_MEMBERS = 1000
"""Sites of a round; sums of more need other parameters."""
ROSTER = MOST_MEMBERS * 260
"""Bytes of the header that the roster of a task takes at most."""
WORDS = {64: (np.uint64, torch.int64), 32: (np.uint32, torch.int32)}
"""Words of a vector, and as what they travel: torch has no unsigned sums."""


def up_groups(message: Up) -> dict[str, Params]:
    """What a site sends in a phase, as groups."""
    match message:
        case Keys(signature=signature):
            return {"secure": _rows({0: message.body + signature})}
        case Boxes(boxes):
            return {"secure": _rows(boxes)}
        case Masked(vector):
            kind = WORDS[8 * vector.itemsize][1]
            return {
                "secure": {"vector": torch.from_numpy(vector.view(f"i{vector.itemsize}")).to(kind)}
            }
        case Confirmation(signature):
            return {"secure": _rows({0: signature})}
        case Opened(seeds, masks):
            return {"secure/seeds": _rows(seeds), "secure/masks": _rows(masks)}


def read_up(phase: str, message: Message, width: int) -> Up:
    """What a site says that it sends in ``phase``; raises MessageError where it is of another form."""
    groups = ("secure/seeds", "secure/masks") if phase == "open" else ("secure",)
    if message.groups.keys() != {*groups}:
        raise MessageError(f"it sends {short(', '.join(sorted(message.groups)))} in phase {phase}")
    first = message.groups[groups[0]]
    match phase:
        case "keys":
            return _keys(_only(first))
        case "shares":
            return Boxes(_bytes(first))
        case "masked":
            vector, (word, kind) = first.get("vector"), WORDS[width]
            if first.keys() != {"vector"} or vector is None or vector.dtype != kind:
                raise MessageError("its masked vector is not of the type that was agreed")
            return Masked(vector.numpy().view(word))
        case "confirm":
            return Confirmation(_only(first))
        case "open":
            return Opened(_bytes(first), _bytes(message.groups["secure/masks"]))
        case _:
            raise MessageError(f"there is no phase {short(phase)}")


def down_groups(message: Down, certificates: Mapping[int, bytes]) -> dict[str, Params]:
    """What the server sends, as groups; ``certificates`` go with the keys, to whoever lacks them."""
    match message:
        case Roll(keys):
            found = {"secure": _rows({k: v.body + v.signature for k, v in keys.items()})}
            return found | ({"certificates": _rows(certificates)} if certificates else {})
        case Boxes(boxes):
            return {"secure": _rows(boxes)}
        case Survivors(places):
            return {"secure": {"places": torch.tensor(places, dtype=torch.int32)}}
        case Confirmations(signatures):
            return {"secure": _rows(signatures)}


def read_down(phase: str, message: Message) -> Down:
    """What the server sends for a site to go on with ``phase``; raises MessageError for anything else."""
    groups = message.groups.keys() - ({"certificates"} if phase == "shares" else set())
    if groups != {"secure"}:
        raise MessageError(f"it sends {short(', '.join(sorted(groups)))} for phase {short(phase)}")
    tree = message.groups["secure"]
    match phase:
        case "shares":
            return Roll({k: _keys(v) for k, v in _bytes(tree).items()})
        case "masked":
            return Boxes(_bytes(tree))
        case "confirm":
            return Survivors(tuple(_whole(tree, "places")))
        case "open":
            return Confirmations(_bytes(tree))
        case _:
            raise MessageError(f"there is no phase {short(phase)}")


def blocks(code: Sequence[bytes]) -> dict[str, Params]:
    """Ciphertexts, in their order, as groups."""
    return {"secure": _rows(dict(enumerate(code)))}


def read_blocks(message: Message, count: int) -> list[bytes]:
    """So many ciphertexts of a message; raises MessageError for anything else."""
    found = _bytes(message.groups.get("secure", {}), count)
    if message.groups.keys() != {"secure"} or [*found] != [*range(count)]:
        raise MessageError(f"{count} ciphertexts are due, and no other number")
    return [*found.values()]


def certificates(message: Message) -> dict[int, bytes]:
    """Certificates that came with the keys, by place."""
    return _bytes(message.groups["certificates"]) if "certificates" in message.groups else {}


def terms_facts(terms: Terms) -> dict[str, Any]:
    """What a task says of its attempt; all other terms a site reckons itself, by the plan it joined."""
    roster = [[m.name, m.certificate.hex()] for m in terms.members]
    said = {"attempt": terms.attempt.hex(), "threshold": terms.threshold, "members": roster}
    return {"secure": said}


def read_terms(message: Message) -> tuple[bytes, tuple[Member, ...], int]:
    """Attempt, roster and threshold of a task; raises MessageError where there are none."""
    said = message.facts.get("secure")
    rows = said.get("members") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(rows, list) or len(rows) > MOST_MEMBERS:
        raise MessageError("the task names no roster, and the run is one of secure aggregation")
    sound = (
        isinstance(r, list) and len(r) == 2 and all(isinstance(v, str) for v in r) for r in rows
    )
    if not all(sound):
        raise MessageError("the roster is no list of names and fingerprints")
    members = tuple(Member(name[:100], _hex(print_of, DIGEST)) for name, print_of in rows)
    threshold = said.get("threshold")
    if type(threshold) is not int or not 0 <= threshold <= MOST_MEMBERS:
        raise MessageError("the threshold is no number of sites")
    return _hex(said.get("attempt"), ATTEMPT), members, threshold


def _keys(data: bytes) -> Keys:
    if len(data) <= 3 * KEY:
        raise MessageError("keys of a wrong length")
    box, mask, commitment = (data[k : k + KEY] for k in range(0, 3 * KEY, KEY))
    return Keys(box, mask, commitment, data[3 * KEY :])


def _rows(found: Mapping[int, bytes]) -> Params:
    """Byte strings by place: one after another, and where each ends."""
    whole = b"".join(found.values())
    ends = np.cumsum([len(v) for v in found.values()], dtype=np.int64)
    return {
        "places": torch.tensor([*found], dtype=torch.int32),
        "ends": torch.from_numpy(ends),
        "bytes": torch.frombuffer(bytearray(whole or b"\0"), dtype=torch.uint8)[: len(whole)],
    }


def _bytes(tree: Params, most: int = MOST_MEMBERS) -> dict[int, bytes]:
    if tree.keys() != {"places", "ends", "bytes"}:
        raise MessageError("a list of byte strings by place is of another form")
    places, ends, whole = _whole(tree, "places"), _whole(tree, "ends"), tree["bytes"]
    starts = [0, *ends]
    sound = whole.dtype == torch.uint8 and whole.dim() == 1 and len(ends) == len(places)
    if not sound or starts[-1] != len(whole) or any(b < a for a, b in pairwise(starts)):
        raise MessageError("a list of byte strings does not have the lengths that it says")
    if len({*places}) != len(places) or len(places) > most:
        raise MessageError("a list of byte strings has a place twice, or too many")
    data = whole.numpy().tobytes()
    return {k: data[a:b] for k, (a, b) in zip(places, pairwise(starts), strict=True)}


def _only(tree: Params) -> bytes:
    found = _bytes(tree)
    if found.keys() != {0}:
        raise MessageError("one byte string is due, and no list")
    return found[0]


def _whole(tree: Params, name: str) -> list[int]:
    values: Tensor = tree.get(name, torch.zeros(0))
    if values.dtype not in (torch.int32, torch.int64) or values.dim() != 1:
        raise MessageError(f"{name} are no whole numbers")
    return [int(v) for v in values.tolist()]


def _hex(text: object, size: int) -> bytes:
    try:
        found = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        found = b""
    if len(found) != size:
        raise MessageError(f"{size} bytes in hex are due")
    return found
