"""Masks: AES-256 in counter mode, added in place mod 2^32.

The vector is walked in chunks that stay in cache. Every stream adds to a chunk before the next
chunk is touched, so that the vector passes through memory once, whatever the number of streams.
A stream can start anywhere (the offset is in the counter), so that threads split a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedward.privacy.mechanisms.stream import in_parallel, processors

# Of 16 KiB to 1 MiB, 128 to 256 KiB is fastest (it fits the second-level cache), and the larger
# of them lets two threads overlap: each holds Python's lock for some microseconds a chunk.
CHUNK_BYTES: Final = 1 << 18
_BLOCK: Final = 16  # of AES
_WORDS: Final = CHUNK_BYTES // 4
_ALONE: Final = 4 * _WORDS  # below this a second thread costs more than it brings
_ZEROS: Final = bytes(CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class Mask:
    """One stream.

    Attributes:
        seed: 32 secret bytes, used for one vector of one round.
        subtract: Whether the stream is subtracted; of a pair, one adds and one subtracts.
    """

    seed: bytes = field(repr=False)
    subtract: bool = False


def apply_masks(
    vector: NDArray[np.uint32], masks: Sequence[Mask], *, threads: int | None = None
) -> None:
    """Add every mask to `vector`, in place, mod 2^32.

    Args:
        vector: Contiguous, shape `(length,)`; changed.
        masks: The streams.
        threads: How many threads share the work; by default the processors at hand, at most four.

    Raises:
        ValueError: The vector is not a contiguous, writable one of uint32.
    """
    if vector.dtype != np.uint32 or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ValueError("vector must be one-dimensional, contiguous and of uint32")
    if not vector.flags.writeable:
        raise ValueError("vector must be writable")
    workers = min(threads or processors(), max(1, vector.size // _ALONE))
    # Whole chunks for each thread, so that every part starts on a block of the cipher.
    step = -(-vector.size // (workers * _WORDS)) * _WORDS
    in_parallel(
        lambda start: _apply(vector[start : start + step], masks, first=start),
        range(0, vector.size, step),
        threads=threads,
    )


def _apply(part: NDArray[np.uint32], masks: Sequence[Mask], *, first: int) -> None:
    """Add to `part` the streams from their word `first` on."""
    counter = modes.CTR((first * 4 // _BLOCK).to_bytes(_BLOCK, "big"))
    streams = [
        (Cipher(algorithms.AES(mask.seed), counter).encryptor(), mask.subtract) for mask in masks
    ]
    buffer = bytearray(CHUNK_BYTES + _BLOCK - 1)
    words = np.frombuffer(buffer, dtype="<u4", count=_WORDS)
    for start in range(0, part.size, _WORDS):
        chunk = part[start : start + _WORDS]
        stream_words = words[: chunk.size]
        zeros = memoryview(_ZEROS)[: 4 * chunk.size]
        for stream, subtract in streams:
            stream.update_into(zeros, buffer)
            if subtract:
                np.subtract(chunk, stream_words, out=chunk)
            else:
                np.add(chunk, stream_words, out=chunk)
