"""Random bits for rounding and discrete noise: AES-256 in counter mode."""

import hashlib
import secrets
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_KEY: Final = 32
_PIECE: Final = bytes(1 << 16)


class BitStream:
    """An endless stream of random words.

    Attributes:
        private: True only if the operating system chose the key. What a stream that is not
            private has touched must be stamped as not private.
    """

    def __init__(self, key: bytes, *, private: bool) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self.private = private

    @classmethod
    def secure(cls) -> "BitStream":
        """A stream whose key nobody knows."""
        return cls(secrets.token_bytes(_KEY), private=True)

    @classmethod
    def simulated(cls, *seed: int | str) -> "BitStream":
        """The same bits for the same seed, for simulation only."""
        text = "\0".join(f"{type(part).__name__}:{part}" for part in seed)
        return cls(hashlib.sha256(b"fedward bits 1\0" + text.encode()).digest(), private=False)

    def words32(self, size: int) -> NDArray[np.uint32]:
        """`size` words of 32 bits, uniform."""
        return np.frombuffer(self._bytes(4 * size), dtype="<u4")

    def words64(self, size: int) -> NDArray[np.uint64]:
        """`size` words of 64 bits, uniform."""
        return np.frombuffer(self._bytes(8 * size), dtype="<u8")

    def _bytes(self, size: int) -> bytes:
        if size <= len(_PIECE):
            return self._cipher.update(_PIECE[:size])
        return self._cipher.update(bytes(size))
