"""Key agreement, key derivation and sealed boxes: the only file here that calls ``cryptography``."""

import hashlib

from fedtorch.secure.refused import Refused

FIRST_WORDS = b"fedtorch secagg 1"
"""Salt of every key, and first words of everything that is signed."""
KEY = 32
"""Bytes of a key, public or secret, of a seed and of a digest."""
TAG = 16
"""Bytes that a box is longer than what is in it."""


class KeyPair:
    """An X25519 key: the secret half and the public one, 32 bytes each."""

    def __init__(self, secret: bytes) -> None:
        """From its secret half, 32 random bytes."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.secret = secret
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.public = bytes(self._key.public_key().public_bytes_raw())

    def agree(self, public: bytes) -> bytes:
        """What both owners have in common; ``derive`` makes keys of it, it is none itself.

        Raises Refused for a public key that gives everybody the same.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        try:
            return bytes(self._key.exchange(X25519PublicKey.from_public_bytes(public)))
        except ValueError as e:
            raise Refused("keys", "a public key gives everybody the same secret") from e


def derive(secret: bytes, purpose: str, context: bytes) -> bytes:
    """A key for one purpose in one context: HKDF with SHA-256 (RFC 5869)."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return bytes(
        HKDF(SHA256(), KEY, FIRST_WORDS, purpose.encode() + b"\0" + context).derive(secret)
    )


def box(key: bytes, plain: bytes, about: bytes) -> bytes:
    """Sealed with AES-256-GCM; a key seals one box only, so the nonce is zero."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return bytes(AESGCM(key).encrypt(bytes(12), plain, about))


def unbox(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """What is in a box; raises Refused where it is not as it was sealed."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return bytes(AESGCM(key).decrypt(bytes(12), sealed, about))
    except (InvalidTag, ValueError) as e:
        raise Refused("box", "a box of shares does not open") from e


def commit(context: bytes, seed: bytes) -> bytes:
    """A digest that binds to a seed before anybody sees it."""
    return hashlib.sha256(FIRST_WORDS + b" seed\0" + context + seed).digest()


def statement(phase: str, context: bytes, body: bytes) -> bytes:
    """What is signed: TLS signs nothing that begins so."""
    return FIRST_WORDS + b" " + phase.encode() + b"\0" + context + hashlib.sha256(body).digest()
