"""The one encoding that crosses every boundary: a schema, a few facts, and one flat vector.

A message is ``MAGIC``, the length of the header, the header (JSON, padded to 64 bytes) and the numbers of
all tensors one after another, each starting at a multiple of 8 bytes, little-endian. Nothing in it can
name code, and nothing is unpickled. ``decode`` trusts nothing: it raises MessageError and only that.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtorch.types import Params

MAGIC = b"fedtorch message 1\n"
START = len(MAGIC) + 4
HEADER_LIMIT = 1 << 24
"""Bytes of a header: a hundred thousand tensors fit."""
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        torch.complex128, torch.complex64,
    )
}  # fmt: skip
AXES = 16
"""Most dimensions of a tensor."""
DEPTH = 16
"""Most brackets inside one another in the facts of a message."""

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("fedtorch's messages are little-endian, and so must this machine be")


class MessageError(ValueError):
    """A message that is not what it should be; says what is wrong with it."""


@dataclass(frozen=True)
class Message:
    """What is sent: a kind, plain facts, and groups of named tensors."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Params] = field(default_factory=dict)


class Packed(NamedTuple):
    """A message ready to be written: ``size`` bytes in all."""

    head: bytes
    parts: list[Tensor]
    size: int

    def write(self, into: Tensor) -> None:
        """Write to the front of a uint8 buffer of at least ``size`` bytes."""
        into[: len(self.head)] = torch.frombuffer(bytearray(self.head), dtype=torch.uint8)
        for at, part in zip(_starts(self.parts, len(self.head)), self.parts, strict=True):
            if part.numel():
                into[at : at + part.nbytes] = part.reshape(-1).view(torch.uint8)

    def fill(self, block: Tensor) -> Tensor:
        """The part of ``block`` (uint8, zeros) that the message takes, with it written there."""
        self.write(block)
        return block[: self.size]

    def block(self) -> Tensor:
        """A block of its own, uint8."""
        return self.fill(zeros(self.size))


def zeros(size: int) -> Tensor:
    """A block of bytes."""
    return torch.zeros(size, dtype=torch.uint8)


def pack(message: Message) -> Packed:
    """Header and parts of a message; tensors are not copied unless they must be."""
    named = [(g, n, t) for g, tree in message.groups.items() for n, t in tree.items()]
    parts = [t.detach().cpu().contiguous() for _, _, t in named]
    schema = [[g, n, str(t.dtype).removeprefix("torch."), list(t.shape)] for g, n, t in named]
    header = {"kind": message.kind, "facts": message.facts, "schema": schema}
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-(START + len(text)) % 64)
    head = MAGIC + len(text).to_bytes(4, "little") + text
    end = len(head)
    for at, part in zip(_starts(parts, end), parts, strict=True):
        end = at + part.nbytes
    return Packed(head, parts, end)


def encode(message: Message) -> bytes:
    """A message as bytes."""
    return pack(message).block().numpy().tobytes()


def header_room(trees: Mapping[str, Iterable[str]], facts: int = 4096) -> int:
    """Bytes that the header of a message with these tensors (group -> names) can take at most.

    ``facts``: room for everything but the tensors.
    """
    row = 128 + 24 * AXES  # brackets, type and shape; a character may be escaped to twelve
    return facts + sum(row + 12 * (len(g) + len(n)) for g, names in trees.items() for n in names)


def decode(
    data: bytes | Tensor, limit: int | None = None, header_limit: int = HEADER_LIMIT
) -> Message:
    """Read a message; the tensors are views of ``data`` where that is a tensor (uint8).

    Raises MessageError for anything but exactly one whole message of at most ``limit`` bytes, whose header
    has at most ``header_limit``: JSON takes much longer to read, and many times the memory, than tensors.
    """
    if not isinstance(data, Tensor):
        data = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    at = START + _head_length(data, limit, header_limit)
    kind, facts, schema = _header(data[START:at].numpy().tobytes())
    groups: dict[str, Params] = {}
    end = len(data)
    for row in schema:
        group, name, dtype, shape = _row(row)
        at += -at % 8
        size = dtype.itemsize * math.prod(shape)
        if size > end - at:
            raise MessageError(f"cut short: {short(name)} does not fit")
        tree = groups.setdefault(group, {})
        if name in tree:
            raise MessageError(f"{short(name)} is there twice")
        tree[name] = _tensor(data[at : at + size], dtype, shape)
        at += size
    if at != end:
        raise MessageError(f"{end - at} bytes too many")
    return Message(kind, facts, groups)


def short(text: str, most: int = 60) -> str:
    """Quotes others' text in ASCII and cuts it, so that it can neither flood nor forge a log."""
    return ascii(text[:most]) + ("..." if len(text) > most else "")


def printable(text: str, most: int = 300) -> str:
    """A sentence that may hold what somebody else wrote: nothing that moves a cursor, and not for ever."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most])
    return plain + ("..." if len(text) > most else "")


def _head_length(data: Tensor, limit: int | None, header_limit: int) -> int:
    if limit is not None and len(data) > limit:
        raise MessageError(f"{len(data)} bytes, but at most {limit} are taken")
    if len(data) < START:
        raise MessageError(f"{len(data)} bytes are too few for a message")
    front = bytes(data[:START].tolist())
    length = int.from_bytes(front[len(MAGIC) :], "little")
    if front[: len(MAGIC)] != MAGIC:
        raise MessageError("this is no fedtorch message of version 1")
    if length > header_limit:
        raise MessageError(f"a header of {length} bytes, but at most {header_limit} are taken")
    if length > len(data) - START or (START + length) % 64:
        raise MessageError("the length of the header is wrong")
    return length


def _starts(parts: list[Tensor], at: int) -> Iterator[int]:
    for part in parts:
        at += -at % 8
        yield at
        at += part.nbytes


def _header(text: bytes) -> tuple[str, dict[str, Any], list[Any]]:
    try:
        header = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_twice)
    except (ValueError, RecursionError) as e:
        raise MessageError("the header is not JSON") from e
    if not isinstance(header, dict) or header.keys() != {"kind", "facts", "schema"}:
        raise MessageError("the header needs kind, facts and schema")
    kind, facts, schema = header["kind"], header["facts"], header["schema"]
    if not (isinstance(kind, str) and isinstance(facts, dict) and isinstance(schema, list)):
        raise MessageError("the header has fields of a wrong type")
    _flat_enough(facts)
    return kind, facts, schema


def _flat_enough(facts: dict[str, Any]) -> None:
    level: list[Any] = [facts]
    for _ in range(DEPTH):
        inner = [[*v.values()] if isinstance(v, dict) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
        if not level:
            return
    raise MessageError(f"the facts are nested more than {DEPTH} deep")


def _row(row: Any) -> tuple[str, str, torch.dtype, list[int]]:
    if not (isinstance(row, list) and len(row) == 4):
        raise MessageError("a row of the schema needs group, name, dtype and shape")
    group, name, dtype, shape = row
    if not (isinstance(group, str) and isinstance(name, str)) or dtype not in [*DTYPES]:
        raise MessageError("a row of the schema names no tensor")
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or len(shape) > AXES or math.prod(n or 1 for n in shape) >= 1 << 40:
        raise MessageError(f"the shape of {short(name)} is wrong")
    return group, name, DTYPES[dtype], shape


def _tensor(raw: Tensor, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not raw.numel():
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool and int(raw.max()) > 1:
        raise MessageError("a truth value is neither 0 nor 1")
    if dtype.is_complex:  # a copy: a view would have to start at a multiple of two real numbers
        return torch.complex(*raw.view(dtype.to_real()).view(*shape, 2).unbind(-1))
    return raw.view(dtype).view(shape)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _no_twice(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key is there twice")
    return table
