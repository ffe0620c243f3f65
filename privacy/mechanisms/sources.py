"""The two sources of noise: a cryptographic stream, and a stream that repeats."""

import math
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from fedward.privacy.mechanisms.noise import Draw, DrawsSteps, NoiseSource
from fedward.privacy.mechanisms.normal import RESOLUTION, NormalDraws
from fedward.privacy.mechanisms.seeding import Seed, philox_keys

_KEY_BYTES = 32
_COUNTER = modes.CTR(bytes(16))  # from zero; safe: every key encrypts one stream, once
_ZEROS = bytes(1 << 18)


def secure_source() -> NoiseSource:
    """Noise that protects: AES-256 in counter mode under a key of the operating system.

    Has no seed. Safe to share between threads; a forked child continues under a key of its own.
    """
    return SecureSource()


def simulated_source(*seed: int | str) -> NoiseSource:
    """Noise that repeats, for simulations: `private` is False.

    The same seed gives the same draws in every process and on every runtime. Whoever knows the
    seed can take the noise off again.

    Args:
        seed: One part or more, such as study seed, site and round; `1` and `"1"` differ.

    Raises:
        ValueError: No seed was given.
    """
    if not seed:
        raise ValueError("a simulated source needs a seed; real noise comes from secure_source()")
    return SimulatedSource(philox_keys([seed]).tolist()[0])


def simulated_sources(
    seeds: Sequence[Seed], *, spent: Sequence["SimulatedSource"] = ()
) -> list["SimulatedSource"]:
    """`simulated_source` of each seed.

    Args:
        seeds: At least one part each.
        spent: Sources that nobody will use again: they are started anew, which takes less time
            than making others.

    Raises:
        ValueError: As `simulated_source`.
    """
    if not all(seeds):
        raise ValueError("a simulated source needs a seed; real noise comes from secure_source()")
    keys = philox_keys(seeds).tolist()
    again = min(len(seeds), len(spent))
    for source, key in zip(spent, keys, strict=False):
        source.restart(key)
    return [*spent[:again], *(SimulatedSource(key) for key in keys[again:])]


class SecureSource:
    """A cryptographic stream as a `NoiseSource`; made by `secure_source`."""

    private = True

    def __init__(self) -> None:
        self.rekey()
        _living.add(self)

    def __repr__(self) -> str:
        """No key, no state."""
        return "SecureSource()"

    def rekey(self) -> None:
        """Start a fresh stream, under a new key of the operating system."""
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._stream = _stream(os.urandom(_KEY_BYTES))

    def uniform(self, size: int) -> NDArray[np.float64]:
        """See `NoiseSource`; multiples of 2**-53."""
        words = np.empty(_size(size), dtype=np.uint64)
        with self._request():
            self._fill(words)
        words >>= np.uint64(11)
        return np.multiply(words, 2.0**-53)

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:
        """See `NoiseSource`; multiples of `std / RESOLUTION`."""
        return _gaussian(self, size, std)

    @contextmanager
    def drawing(self, size: int) -> Iterator[Draw]:  # noqa: ARG002 (the interface)
        """See `DrawsSteps` and `normal`: of each draw 32 random bits, or more."""
        with self._request():
            yield NormalDraws(self._fill)

    @contextmanager
    def _request(self) -> Iterator[None]:
        """Alone with the stream, whose key is erased afterwards.

        The next key is taken from the stream itself ("fast key erasure", Bernstein 2017), so a
        later look at memory does not give back noise that was already added.
        """
        if os.getpid() != self._process:  # a fork that Python did not see
            self.rekey()
        with self._lock:
            try:
                yield
            finally:
                self._stream = _stream(self._stream.update(_ZEROS[:_KEY_BYTES]))

    def _fill(self, words: NDArray[np.uint64]) -> None:
        """Overwrite `words` with the next ones of the stream."""
        view = words.view(np.uint8).data
        for start in range(0, len(view), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            self._stream.update_into(_ZEROS[: len(part)], part)


class SimulatedSource:
    """A stream that repeats, as a `NoiseSource`; made by `simulated_source`.

    Attributes:
        key: Two words, of Philox: a hash of the seed, so that streams of different seeds have
            nothing in common.
        used: How many words of the stream are used. `rows` adds to it where it draws for many
            sources at once; nobody else may draw from them meanwhile.
    """

    private = False

    def __init__(self, key: Sequence[int]) -> None:
        self._lock = threading.Lock()
        self._generator: np.random.Generator | None = None  # takes longer than a small draw
        self.restart(key)

    def restart(self, key: Sequence[int]) -> None:
        """Become the source of another key, from its beginning."""
        self.key, self.used, self._stands = key, 0, -1

    def uniform(self, size: int) -> NDArray[np.float64]:
        """See `NoiseSource`."""
        with self._lock:
            return self._next(_size(size)).random(size)

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:
        """See `NoiseSource`; multiples of `std / RESOLUTION`."""
        return _gaussian(self, size, std)

    @contextmanager
    def drawing(self, size: int) -> Iterator[Draw]:  # noqa: ARG002 (the interface)
        """See `DrawsSteps` and `normal`."""
        with self._lock:
            yield NormalDraws(self._fill)

    def fill_uniform(self, out: NDArray[np.float64]) -> None:
        """Overwrite `out`, shape `(size,)`, contiguous, with what `uniform` would give."""
        with self._lock:
            self._next(out.size).random(out=out)

    def _fill(self, words: NDArray[np.uint64]) -> None:
        """Overwrite `words` with the next ones of the stream."""
        words[:] = self._next(words.size).bit_generator.random_raw(words.size)

    def _next(self, words: int) -> np.random.Generator:
        """The generator, where the stream stands, of which so many words are used now."""
        if self._generator is None:
            self._generator = np.random.Generator(np.random.Philox(key=self.key))
        if self._stands != self.used:
            blocks, rest = divmod(self.used, _BLOCK)
            state = {"counter": [blocks, 0, 0, 0], "key": self.key}
            self._generator.bit_generator.state = {**_PHILOX, "state": state}
            self._generator.bit_generator.random_raw(rest, output=False)
        self.used += words
        self._stands = self.used
        return self._generator


_BLOCK = 4  # words for each counter
_PHILOX = {
    "bit_generator": "Philox",
    "buffer": [0] * _BLOCK,
    "buffer_pos": _BLOCK,
    "has_uint32": 0,
    "uinteger": 0,
}


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), _COUNTER).encryptor()


def _gaussian(source: DrawsSteps, size: int, std: float) -> NDArray[np.float64]:
    scale = _std(std) / RESOLUTION
    steps = np.empty(_size(size), dtype=np.int32)
    with source.drawing(size) as draw:
        draw(steps)
    return np.multiply(steps, scale)


def _size(size: int) -> int:
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    return size


def _std(std: float) -> float:
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f"std must be positive and finite, got {std}")
    return std


_living: "weakref.WeakSet[SecureSource]" = weakref.WeakSet()


def _rekey_all() -> None:
    """After a fork: the child must not repeat its parent's stream, nor wait for its locks."""
    for source in list(_living):
        source.rekey()


os.register_at_fork(after_in_child=_rekey_all)
