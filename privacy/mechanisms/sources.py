"""The two sources of noise: a cryptographic stream, and a stream that repeats."""

import hashlib
import json
import math
import os
import threading
import weakref

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from fedward.privacy.mechanisms.noise import NoiseSource

_KEY_BYTES = 32
_BLOCK = 1 << 15  # doubles that are worked on at a time: they stay in the second-level cache
_ZERO_COUNTER = bytes(16)  # safe: every key encrypts one stream, once
_ZEROS = bytes(8 * _BLOCK)

# Taylor coefficients of cos and sin of (pi/2) u in u^2, for |u| <= 1/2: error below 1e-15.
_QUARTER = math.pi / 2
_COS = tuple((-1) ** k * _QUARTER ** (2 * k) / math.factorial(2 * k) for k in range(9))
_SIN = tuple((-1) ** k * _QUARTER ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(9))


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
    return SimulatedSource(hashlib.sha256(json.dumps(seed).encode()).digest())


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
        words = self._words(_size(size))
        words >>= np.uint64(11)
        return np.multiply(words, 2.0**-53)

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:
        """See `NoiseSource`. Box and Muller 1958, with 63 bits of radius and 64 of angle.

        The longest draw is 9.4 standard deviations: the tail that is missing has probability
        2**-64 an element. Pairs that are cut off at the end of an odd number are thrown away.
        """
        size, std = _size(size), _std(std)
        drawn = np.empty(size + size % 2)
        for start in range(0, drawn.size, _BLOCK):
            part = drawn[start : start + _BLOCK]
            _box_muller(self._words(part.size), std=std, out=part)
        return drawn[:size]

    def _words(self, size: int) -> NDArray[np.uint64]:
        """`size` words of the stream. The key is erased after each request.

        The next key is taken from the stream itself ("fast key erasure", Bernstein 2017), so a
        later look at memory does not give back noise that was already added.
        """
        if os.getpid() != self._process:  # a fork that Python did not see
            self.rekey()
        words = np.empty(size, dtype=np.uint64)
        view = words.view(np.uint8).data
        with self._lock:
            for start in range(0, len(view), len(_ZEROS)):
                part = view[start : start + len(_ZEROS)]
                self._stream.update_into(_ZEROS[: len(part)], part)
            self._stream = _stream(self._stream.update(_ZEROS[:_KEY_BYTES]))
        return words


class SimulatedSource:
    """A stream that repeats, as a `NoiseSource`; made by `simulated_source`."""

    private = False

    def __init__(self, key: bytes) -> None:
        self._lock = threading.Lock()
        # Philox under a hash of the seed: streams of different seeds have nothing in common.
        self._generator = np.random.Generator(
            np.random.Philox(np.random.SeedSequence(int.from_bytes(key)))
        )

    def uniform(self, size: int) -> NDArray[np.float64]:
        """See `NoiseSource`."""
        with self._lock:
            return self._generator.random(_size(size))

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:
        """See `NoiseSource`."""
        with self._lock:
            drawn = self._generator.standard_normal(_size(size))
        drawn *= _std(std)
        return drawn


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.CTR(_ZERO_COUNTER)).encryptor()


def _size(size: int) -> int:
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    return size


def _std(std: float) -> float:
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f"std must be positive and finite, got {std}")
    return std


def _box_muller(words: NDArray[np.uint64], *, std: float, out: NDArray[np.float64]) -> None:
    """Turn an even number of words into as many normal draws."""
    half = words.size // 2
    radius_words, angle_words = words[:half], words[half:].view(np.int64)
    radius_words >>= np.uint64(1)
    radius = radius_words.view(np.int64).astype(np.float64)
    radius += 0.5
    radius *= 2.0**-63
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    radius *= std
    turn = angle_words.astype(np.float64)  # the angle over a full turn, in [-1/2, 1/2)
    turn *= 2.0**-64
    cosine, sine = out[:half], out[half:]
    square = turn * turn
    _polynomial(_COS, square, out=cosine)
    _polynomial(_SIN, square, out=sine)
    sine *= turn
    # cos and sin of a quarter of the angle; the angle is doubled twice. NumPy's own sin and cos
    # take twice as long on processors without AVX-512.
    for _ in range(2):
        np.multiply(cosine, sine, out=turn)
        cosine *= cosine
        sine *= sine
        cosine -= sine
        np.add(turn, turn, out=sine)
    cosine *= radius
    sine *= radius


def _polynomial(
    coefficients: tuple[float, ...], x: NDArray[np.float64], *, out: NDArray[np.float64]
) -> None:
    """Horner's rule."""
    np.multiply(x, coefficients[-1], out=out)
    for coefficient in coefficients[-2:0:-1]:
        out += coefficient
        out *= x
    out += coefficients[0]


_living: "weakref.WeakSet[SecureSource]" = weakref.WeakSet()


def _rekey_all() -> None:
    """After a fork: the child must not repeat its parent's stream, nor wait for its locks."""
    for source in list(_living):
        source.rekey()


os.register_at_fork(after_in_child=_rekey_all)
