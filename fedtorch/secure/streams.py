"""Masks: keystreams of many keys, added to a vector block by block."""

from collections.abc import Iterable

import numpy as np

from fedtorch.privacy.noise.keystream import Scratch, keystream

BLOCK = 1 << 16
"""Bytes of the sum that stay in a core's cache while all streams pass."""


def add(total: np.ndarray, keys: Iterable[tuple[bytes, int]]) -> None:
    """Add (+1) or take off (-1) each key's stream, mod 2^width, in place; ``total`` is uint32 or uint64.

    A stream begins at its key's first word: a key serves one vector only.
    """
    streams = [(keystream(key), sign) for key, sign in keys]
    scratch, step = Scratch(), BLOCK // total.itemsize
    for at in range(0, len(total), step):
        part = total[at : at + step]
        count = -(-part.nbytes // 8)
        for words, sign in streams:
            mask = words(count, scratch).view(total.dtype)[: len(part)]
            (np.add if sign > 0 else np.subtract)(part, mask, out=part)
