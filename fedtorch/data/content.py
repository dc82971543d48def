"""Decisions by the content of examples alone: the part each belongs to, and a fingerprint of all.

Where an example goes is decided by a keyed hash of the example itself. One more or one fewer moves no
other, which a shuffle of their numbers would; privacy is about exactly such neighbours.
"""

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedtorch import seeds
from fedtorch.types import ConfigError

Source = Dataset | Sequence[Tensor | Sequence[str]]
"""A dataset, or columns with a row for each example."""

MOST_BYTES = 1 << 26
"""A fingerprint reads at most so much of tensors; of more it takes rows that are spread evenly."""

MOST_READ = 256
"""A fingerprint reads at most so many examples of a dataset that is no table of tensors."""


def coins(rows: Source, seed: int, *purpose: str) -> Tensor:
    """A number in [0, 1) for each example, [N] float64, from a keyed hash of its content.

    The second of two equal examples has a coin of its own: as a set they are one more, and no other
    moves. Every example is read once.
    """
    key = seeds.derive(seed, *purpose).to_bytes(8, "little")
    seen: Counter[bytes] = Counter()
    found = []
    for row in _encoded(rows):
        coin = hashlib.blake2b(row, digest_size=8, key=key).digest()
        seen[coin] += 1
        if seen[coin] > 1:
            again = coin + seen[coin].to_bytes(8, "little")
            coin = hashlib.blake2b(again, digest_size=8, key=key).digest()
        found.append(coin)
    whole = np.frombuffer(b"".join(found), np.uint64)
    # 53 bits are what a float64 holds: never 1.0
    return torch.from_numpy((whole >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def split(
    rows: Source, fraction: float, seed: int, option: str = "dataset.test_fraction"
) -> tuple[Tensor, Tensor]:
    """Indices for training and for what is held out: about ``fraction`` of them, by each one's coin.

    A fraction of 0 holds nothing out. Raises ConfigError, naming ``option``, where a part is left empty.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"{option} must be between 0 (nothing is held out) and 1, got {fraction}")
    held = coins(rows, seed, "test split") < fraction
    keep, out = (~held).nonzero().flatten(), held.nonzero().flatten()
    if not len(keep) or (fraction and not len(out)):
        raise ConfigError(
            f"{len(held)} examples are too few to split: with {option} {fraction:g} "
            f"{'none is left for training' if not len(keep) else 'none is held out'}: give more examples, "
            "or another share"
        )
    return keep, out


def fingerprint(data: Dataset) -> str:
    """A digest of the number of examples and of their contents; bounded work, however many there are."""
    n = len(cast(Any, data))
    if isinstance(data, TensorDataset):
        size = sum(t.numel() * t.element_size() for t in data.tensors)
        most = n if size <= MOST_BYTES else max(1, n * MOST_BYTES // size)
    else:
        most = MOST_READ
    index = range(n) if n <= most else np.linspace(0, n - 1, most).astype(int).tolist()
    digest = hashlib.blake2b(f"{n}".encode(), digest_size=16)
    for row in _encoded(data, index):
        digest.update(hashlib.blake2b(row, digest_size=16).digest())
    return digest.hexdigest()


def _encoded(rows: Source, index: Sequence[int] | None = None) -> Iterator[bytes]:
    if isinstance(rows, TensorDataset):
        rows = rows.tensors
    if isinstance(rows, Dataset):
        n = len(cast(Any, rows))
        for i in range(n) if index is None else index:
            # a transform that draws is part of the example: it draws the same wherever the example stands
            with seeds.seeded(0):
                yield _as_bytes(rows[i])
        return
    columns = [_column(c) for c in rows]
    for i in range(len(rows[0])) if index is None else index:
        yield b"".join(c(i) for c in columns)


def _column(column: Tensor | Sequence[str]) -> Callable[[int], bytes]:
    if not isinstance(column, Tensor):
        return lambda i: column[i].encode() + b"\0"
    if not column.numel():
        return lambda i: b""
    flat = column.detach().cpu().reshape(len(column), -1).contiguous()
    raw = flat.view(torch.uint8).numpy()
    return lambda i: raw[i].tobytes()


def _as_bytes(value: Any) -> bytes:
    # a length before each part: no two values are written alike
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous()
        kind = f"{array.dtype}{tuple(array.shape)}".encode()
        body = array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
        return b"t%d:" % (len(kind) + len(body)) + kind + body
    if isinstance(value, np.ndarray) and value.dtype != object:
        return (
            _as_bytes(torch.from_numpy(np.ascontiguousarray(value)))
            if value.dtype.kind in "biuf"
            else value.tobytes()
        )
    if isinstance(value, Mapping):
        parts = [_as_bytes(k) + _as_bytes(v) for k, v in value.items()]
        return b"d%d:" % len(parts) + b"".join(parts)
    if isinstance(value, (tuple, list)):
        return b"l%d:" % len(value) + b"".join(map(_as_bytes, value))
    plain = value if isinstance(value, (str, bytes, int, float, type(None))) else None
    body = repr(plain).encode() if plain is value else pickle.dumps(value)
    return b"v%d:" % len(body) + body
