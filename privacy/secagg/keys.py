"""Key agreement, and every key that follows from it.

X25519 (RFC 7748) and HKDF with SHA-256 (RFC 5869). What a key is for, for which sites and for
which round stands in its derivation, so that no two uses share a key and no revealed round key
says anything of another round's.
"""

import hashlib
import hmac
import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedward.privacy.secagg.shamir import PRIME

SIZE: Final = 32
TAG: Final = 16
COMMITMENT: Final = 16
_PROTOCOL: Final = b"fedward secure aggregation 1: "
_ZERO_NONCE: Final = bytes(12)  # safe: a key seals one message, which is always the same


def derive(root: bytes, label: str, round_number: int, *indices: int) -> bytes:
    """A key of 32 bytes for one purpose: the first block of HKDF-Expand.

    Args:
        root: 32 secret bytes.
        label: What the key is for.
        round_number: The round that it is for.
        indices: The sites that it is for, in order.
    """
    info = (
        _PROTOCOL
        + label.encode()
        + b"\0"
        + struct.pack(f"<I{len(indices)}H", round_number, *indices)
    )
    return hmac.digest(root, info + b"\x01", "sha256")


def derive_secret(root: bytes, label: str, round_number: int, index: int) -> bytes:
    """As `derive`, below Shamir's prime, so that it can be shared."""
    secret = int.from_bytes(derive(root, label, round_number, index), "big")
    # A wrap happens with probability 2^-248; it keeps the function total.
    return (secret % PRIME).to_bytes(SIZE, "big")


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private key, 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, *, context: bytes) -> bytes:
    """The root of all keys between two sites.

    Args:
        private: Own X25519 private key.
        public: The other's public key.
        context: Digest of the signed key list: sites that were shown different lists, or other
            terms, do not agree on a key.

    Raises:
        ValueError: The public key is of low order, which no honest site sends.
    """
    shared = X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(public)
    )
    return HKDF(hashes.SHA256(), SIZE, salt=context, info=_PROTOCOL + b"pair").derive(shared)


def usable(public: bytes) -> bool:
    """Whether a public key is one to agree with: not of low order."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def seal(key: bytes, plaintext: bytes) -> bytes:
    """Encrypt and authenticate under a key that seals nothing else (ChaCha20-Poly1305)."""
    return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, plaintext, None)


def unseal(key: bytes, sealed: bytes) -> bytes | None:
    """The plaintext, or None if it was not sealed with this key."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, sealed, None)
    except InvalidTag:
        return None


def commitment(share: bytes, label: str, round_number: int, dealer: int, holder: int) -> bytes:
    """What a dealer tells the coordinator of a share, so that a changed share is noticed.

    A share is uniform over 256 bits, so its digest hides it.
    """
    info = struct.pack("<IHH", round_number, dealer, holder)
    return hashlib.sha256(_PROTOCOL + label.encode() + b"\0" + info + share).digest()[:COMMITMENT]
