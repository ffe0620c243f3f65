"""Random bits for rounding and discrete noise: AES-256 in counter mode."""

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_KEY: Final = 32
_PIECE: Final = bytes(1 << 18)
_MOST_THREADS: Final = 4

_Item = TypeVar("_Item")


def in_parallel(
    work: Callable[[_Item], None], items: Sequence[_Item], *, threads: int | None = None
) -> None:
    """Call `work` with every item, on some threads.

    Args:
        work: Spends its time where Python's lock is free.
        items: What to work on.
        threads: How many; by default the processors at hand, at most four.
    """
    workers = min(threads or min(_MOST_THREADS, processors()), len(items))
    if workers <= 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, items):
            pass


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


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

    def fork(self) -> "BitStream":
        """A new stream whose key is drawn from this one, for another thread."""
        return BitStream(self._bytes(_KEY), private=self.private)

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
