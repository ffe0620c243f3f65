"""Identities: who signed what.

A site signs its admissions, ledger entries and secure-aggregation keys with Ed25519 (RFC 8032).
A publisher signs releases with ECDSA on P-256 and SHA-256, which OpenSSF model signing takes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fedward.core.canonical import digest
from fedward.core.errors import ConfigError, SignatureInvalid
from fedward.core.files import write_atomic

_ECDSA = ec.ECDSA(hashes.SHA256())
_SHARED_BITS = 0o077


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """The public half of an identity: verifies, and can be shown to anyone."""

    key: ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey

    @classmethod
    def from_pem(cls, pem: bytes) -> "PublicIdentity":
        """Read a PEM public key.

        Raises:
            SignatureInvalid: It is not an Ed25519 or a P-256 public key.
        """
        try:
            key = load_pem_public_key(pem)
        except ValueError as error:
            raise SignatureInvalid("not a PEM public key; ask its owner for it again") from error
        if isinstance(key, ed25519.Ed25519PublicKey):
            return cls(key)
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
            return cls(key)
        raise SignatureInvalid("public key is neither Ed25519 nor ECDSA P-256")

    def pem(self) -> bytes:
        """The key as PEM."""
        return self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key's DER form, 64 hexadecimal digits."""
        return digest(self.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))

    def verify(self, signature: bytes, message: bytes) -> None:
        """Check a signature.

        Raises:
            SignatureInvalid: It does not verify; every cause looks alike.
        """
        try:
            if isinstance(self.key, ed25519.Ed25519PublicKey):
                self.key.verify(signature, message)
            else:
                self.key.verify(signature, message, _ECDSA)
        except InvalidSignature:
            raise SignatureInvalid(
                f"the signature does not verify with key {self.fingerprint[:16]}"
            ) from None


@dataclass(frozen=True, slots=True)
class Identity:
    """A signing key. Never printed, logged or sent."""

    key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey

    @classmethod
    def generate_site(cls) -> "Identity":
        """A new Ed25519 identity, for a site."""
        return cls(ed25519.Ed25519PrivateKey.generate())

    @classmethod
    def generate_publisher(cls) -> "Identity":
        """A new ECDSA P-256 identity, for a publisher of releases."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """Read a private key in PEM that only its owner can read.

        Raises:
            ConfigError: The file is missing, is readable by others, or is no such key.
        """
        try:
            with path.open("rb") as file:
                shared = os.fstat(file.fileno()).st_mode & _SHARED_BITS
                pem = file.read()
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
        if shared:
            raise ConfigError(
                f"holds a private key and others may read it; run: chmod 600 {path}",
                file=str(path),
            )
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError("is not a PEM private key", file=str(path)) from error
        if not isinstance(key, (ed25519.Ed25519PrivateKey, ec.EllipticCurvePrivateKey)):
            raise ConfigError("is neither an Ed25519 nor an ECDSA private key", file=str(path))
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key as PEM with mode 0600, and its public half beside it as `NAME.pub`."""
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomic(path, pem, mode=0o600)
        write_atomic(path.with_name(path.name + ".pub"), self.public.pem())

    def __repr__(self) -> str:
        """Only the public half's fingerprint, so that no log ever holds a key."""
        return f"Identity({self.public.fingerprint[:16]})"

    @property
    def public(self) -> PublicIdentity:
        """The public half."""
        return PublicIdentity(self.key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Sign `message`: 64 bytes for Ed25519, DER for ECDSA."""
        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            return self.key.sign(message)
        return self.key.sign(message, _ECDSA)
