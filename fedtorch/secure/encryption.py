"""Homomorphic encryption by CKKS (Cheon et al. 2017): whoever has the public half can encrypt and add.

The secret key is shared by all clients, so that one of them that works with the server opens every update.
Ring dimension 4,096 with primes of 54 and 54 bits: 108 of the 109 bits that 128-bit security allows there,
enough for sums, which need no multiplication. TenSEAL is used in this file alone.
"""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedtorch.privacy.noise.streams import stream
from fedtorch.types import ConfigError

DEGREE, PRIMES = 4096, (54, 54)
SLOTS = DEGREE // 2
"""Numbers in one ciphertext."""
SCALE = 44
"""Bits behind the point while encrypted: a sum of clients errs by some 1e-9."""
LARGEST_SUM = 2.0 ** (PRIMES[0] - SCALE - 2)
"""Largest number of a sum, with a bit to spare: beyond twice as much it would wrap without a word."""
STEP = 2.0**-23
"""What leaves a holder of the key is rounded to whole multiples of it."""
_TAIL = b"\x19" + struct.pack("<d", 2.0**SCALE)
"""How the library ends a ciphertext."""
FLOOD = 1e-7
"""Standard deviation of the noise that is added before: a hundred times what decryption errs by."""


def tenseal() -> Any:
    """The library; raises ConfigError without it."""
    try:
        import tenseal as library
    except ImportError as e:
        raise ConfigError(
            "aggregator he needs TenSEAL, which is not installed: pip install 'fedtorch[he]', or use "
            "aggregator secure, which needs nothing more"
        ) from e
    return library


def make_keys() -> tuple[bytes, bytes]:
    """A secret key for all clients, and the public half for the server.

    Raises ConfigError without TenSEAL.
    """
    ts = tenseal()
    context = ts.context(ts.SCHEME_TYPE.CKKS, DEGREE, -1, list(PRIMES))
    context.global_scale = 2.0**SCALE
    secret = bytes(context.serialize(save_secret_key=True))
    context.make_context_public()
    return secret, bytes(context.serialize())


class Adder:
    """What a server can do: encrypt and add, and nothing else. It has no secret key."""

    def __init__(self, public: bytes) -> None:
        """Raises ConfigError for a key that is secret: a server must not have it."""
        self._context = _context(public)
        if self._context.is_private():
            raise ConfigError(
                "this is the secret key of the clients, which a server must never have: give it he.public"
            )

    def encrypt(self, values: np.ndarray) -> list[bytes]:
        """Numbers, none beyond ``MOST``, as ciphertexts of ``SLOTS`` of them."""
        return _encrypted(self._context, values)

    def look(self, code: Sequence[bytes], size: int) -> None:
        """Whether these are ciphertexts of so many numbers that add to others; raises ConfigError."""
        ts = tenseal()
        for k, block in enumerate(code):
            found = _vector(self._context, block, min(size - k * SLOTS, SLOTS))
            try:
                found += ts.ckks_vector(self._context, [0.0] * found.size())
            except (ValueError, RuntimeError) as e:
                raise ConfigError(f"this is no ciphertext that can be added: {e}") from e

    def add(self, parts: Sequence[Sequence[bytes]]) -> list[bytes]:
        """The sum of several clients' ciphertexts."""
        ts = tenseal()
        sums = [ts.ckks_vector_from(self._context, block) for block in parts[0]]
        for other in parts[1:]:
            for total, block in zip(sums, other, strict=True):
                total += ts.ckks_vector_from(self._context, block)
        return [bytes(s.serialize()) for s in sums]


class Holder:
    """A client: it has the secret key."""

    def __init__(self, secret: bytes) -> None:
        """Raises ConfigError for the public half."""
        self._context = _context(secret)
        if not self._context.is_private():
            raise ConfigError(
                "this is the public half, which opens nothing: give a client he.secret"
            )

    def encrypt(self, values: np.ndarray) -> list[bytes]:
        """Numbers, none beyond ``MOST``, as ciphertexts of ``SLOTS`` of them."""
        return _encrypted(self._context, values)

    def opened(self, sums: Sequence[bytes], size: int) -> np.ndarray:
        """A sum of so many numbers as it may be told: see ``told``."""
        return told(self.exact(sums, size))

    def exact(self, sums: Sequence[bytes], size: int) -> np.ndarray:
        """A sum as it comes out, for the eyes of its holder alone; raises ConfigError for anything else."""
        left = [min(size - k * SLOTS, SLOTS) for k in range(len(sums))]
        found = [_vector(self._context, b, n) for b, n in zip(sums, left, strict=True)]
        return np.concatenate([np.asarray(f.decrypt(), np.float64) for f in found])


def told(exact: np.ndarray) -> np.ndarray:
    """A sum as it may leave the holder of the key: with noise of ``FLOOD``, rounded to ``STEP``.

    What CKKS decrypts to carries an error that is made of the key: told as it is, some of it gives the key
    away (Li and Micciancio 2021, eprint 2020/1533). It errs by 1e-6 at most, but for a chance of 1e-15 a
    number.
    """
    noise = stream("aes", None, "flood").normal(exact.shape).numpy()
    rounded: np.ndarray = np.rint((exact + FLOOD * noise) / STEP) * STEP
    return rounded


def _context(key: bytes) -> Any:
    try:
        return tenseal().context_from(key)
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"this is no key of homomorphic encryption: {e}") from e


def _vector(context: Any, block: bytes, size: int) -> Any:
    """A ciphertext of so many numbers; raises ConfigError for anything else.

    The library takes an envelope without a ciphertext in it, or with another scale, and falls over it
    later, process and all: so the envelope (sizes, ciphertexts and scale of a protobuf) is read here first.
    """
    head = b"\x0a" + _varint(len(_varint(size))) + _varint(size) + b"\x12"
    rest = block[len(head) : -len(_TAIL)]
    whole = block.startswith(head) and block.endswith(_TAIL)
    if not whole or all(rest[:k] != _varint(len(rest) - k) for k in range(1, 6)):
        raise ConfigError(f"this is no ciphertext of {size} numbers under the scale of 2^{SCALE}")
    try:
        return tenseal().ckks_vector_from(context, block)
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"this is no ciphertext that can be added: {e}") from e


def _varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + _varint(n >> 7)


def _encrypted(context: Any, values: np.ndarray) -> list[bytes]:
    ts = tenseal()
    if not np.abs(values).max(initial=0.0) <= LARGEST_SUM:
        raise ConfigError(f"a number beyond {LARGEST_SUM:g} cannot be encrypted for a sum")
    parts = (values[i : i + SLOTS] for i in range(0, len(values), SLOTS))
    return [bytes(ts.ckks_vector(context, p).serialize()) for p in parts]
