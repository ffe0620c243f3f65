"""Where randomness that protects comes from, and the one function that adds it.

**Sources.** `secure_source` draws from AES-256 in counter mode, keyed by the operating system;
`simulated_source` repeats for the same seed and marks all that it touches as not private.

**Floating point.** Textbook samplers leak: the doubles that a noisy value can take depend on the
secret below the noise (Mironov, "On significance of the least significant bits for differential
privacy", CCS 2012), and where draws are made in pairs, two of them betray whether a guess of the
secret is right (Holohan and Braghin, "Secure random sampling in differential privacy", ESORICS
2021). `add_noise` therefore releases no such double. It adds noise of full resolution to the
vector in double precision and rounds the *sum* to multiples of a power of two near `std / 2**16`,
which depends on `std` alone. Rounding the sum is post-processing, so it costs no sensitivity. Every
multiple within nine standard deviations of every secret is reached, each by more than 1e10 of
the sampler's outputs, so which values occur says nothing; and each draw is made of words of its
own (`normal`), so there is no pair.
"""

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

GRID_BITS = 16
"""Released values are multiples of the power of two in (std / 2**17, std / 2**16]."""

_LARGE = 1 << 13  # from here on memory is worth a thought
_CHUNK = 1 << 17  # a draw of a source has a fixed cost, and its working space is to stay small


class NoiseSource(Protocol):
    """Draws that a mechanism needs. One source serves one site.

    Attributes:
        private: True only for the cryptographic source. What a source that is not private
            has touched must be stamped as not private.
    """

    private: bool

    def gaussian(self, size: int, *, std: float) -> NDArray[np.floating[Any]]:
        """`size` draws of a normal distribution with mean 0 and standard deviation `std`.

        At full resolution (float64 from the sources of Fedward). Never to be added to what is
        released by hand: that is what `add_noise` is for.
        """
        ...

    def uniform(self, size: int) -> NDArray[np.float64]:
        """`size` draws from [0, 1), for Poisson sampling and for rounding."""
        ...


@runtime_checkable
class FillsMemory(Protocol):
    """A source that can draw into memory that is there already, which saves page faults."""

    def fill_gaussian(self, out: NDArray[np.float64], *, std: float) -> None:
        """Overwrite `out`, shape `(size,)`, contiguous, with what `gaussian` would give."""
        ...


def add_noise(
    vector: NDArray[np.float32] | NDArray[np.float64],
    *,
    std: float,
    source: NoiseSource,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Release `vector` with Gaussian noise: the only way in which anything leaves with noise.

    The sum is rounded to a grid, see the top of the module. Rounding adds less than 1e-10 of the
    noise's variance.

    Args:
        vector: Any shape; what is released, already clipped.
        std: Standard deviation of the noise on each element, > 0: noise multiplier times
            sensitivity.
        source: Where the noise comes from.
        out: Where the result goes: contiguous, of the same shape, and possibly `vector` itself,
            of which then nothing is left without noise. None for a new array.

    Returns:
        An array of the same shape.

    Raises:
        ValueError: `std` is not positive and finite, or `vector` is not finite: an infinite or
            NaN element would show through any noise.
    """
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f"std must be positive and finite, got {std}")
    flat: NDArray[Any] = np.ascontiguousarray(vector).reshape(-1)
    released = np.empty(flat.size, dtype=np.float32) if out is None else out.reshape(-1)
    if released.size != flat.size or not (out is None or out.flags.c_contiguous):
        raise ValueError("out is contiguous and of the vector's shape")
    anchor = 1.5 * 2.0**52 * grid_step(std)
    filler = source if flat.size >= _LARGE and isinstance(source, FillsMemory) else None
    memory = np.empty(0 if filler is None else min(_CHUNK, flat.size))
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if not np.isfinite(part).all():
            raise ValueError("a vector that is not finite cannot be released with noise")
        if filler is not None:
            noisy = memory[: part.size]
            filler.fill_gaussian(noisy, std=std)
        else:
            noisy = np.asarray(source.gaussian(part.size, std=std), dtype=np.float64)
        noisy += part
        # Doubles of this size are multiples of the step, so the addition rounds to the nearest.
        noisy += anchor
        np.subtract(noisy, anchor, out=released[start : start + _CHUNK], casting="same_kind")
    return released.reshape(np.shape(vector))


def grid_step(std: float) -> float:
    """The power of two whose multiples are released under noise of standard deviation `std`."""
    exponent = math.frexp(std)[1] - 1  # of the power of two at or below `std`
    return math.ldexp(1.0, exponent - GRID_BITS)
