"""Where randomness that protects comes from, and the one function that adds it.

**Sources.** `secure_source` draws from AES-256 in counter mode, keyed by the operating system;
`simulated_source` repeats for the same seed and marks all that it touches as not private.

**Floating point.** Textbook samplers leak: the doubles that a noisy value can take depend on the
secret below the noise (Mironov, "On significance of the least significant bits for differential
privacy", CCS 2012), and where draws are made in pairs, two of them betray whether a guess of the
secret is right (Holohan and Braghin, "Secure random sampling in differential privacy", ESORICS
2021). `add_noise` therefore adds whole numbers: the vector, rounded to multiples of a step near
`std / 2**22.6`, and a normal draw, rounded to multiples of the same step, which gives what rounding
their sum would. So the mechanism is the Gaussian one on the rounded vector, and then
post-processing. Rounding moves two neighbours' vectors apart by at most two steps an element,
`2 * sqrt(size)` steps in the Euclidean norm, and the noise is made larger by just what that adds
to the sensitivity: by a part in 10,000 for 100,000 elements and a noise multiplier of 1.
"""

import math
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.normal import RESOLUTION

_APART: Final = 2
"""Steps by which an element of two neighbours' vectors can be farther apart after rounding.

Each is moved by one at most: by a half when it is rounded, and by a quarter before that in single
precision, or by a half once more in double precision, see `whole_sums`.
"""

_CHUNK: Final = 1 << 17  # a request has a fixed cost, and its working space is to stay small
BLOCK: Final = 1 << 15  # worked on at a time, in the second-level cache
_SINGLES: Final = 2.0**24
"""Steps below which a product in single precision is off by at most a quarter before it is rounded,
or by a half where it is whole by itself."""
_LARGEST: Final = float(np.finfo(np.float32).max)
_FINEST: Final = 1e-30  # standard deviation, so that a step and its inverse are single precision


class NoiseSource(Protocol):
    """Draws that a mechanism needs. One source serves one site.

    Attributes:
        private: True only for the cryptographic source. What a source that is not private
            has touched must be stamped as not private.
    """

    private: bool

    def gaussian(self, size: int, *, std: float) -> NDArray[np.floating[Any]]:
        """`size` draws of a normal distribution with mean 0 and standard deviation `std`.

        Never to be added to what is released by hand: that is what `add_noise` is for.
        """
        ...

    def uniform(self, size: int) -> NDArray[np.float64]:
        """`size` draws from [0, 1), for Poisson sampling and for rounding."""
        ...


class DrawsSteps(NoiseSource, Protocol):
    """A source that draws what `add_noise` adds, without a detour over doubles."""

    def normal_steps(self, out: NDArray[np.int32]) -> None:
        """Overwrite `out`, contiguous, with rounded normal draws of deviation `RESOLUTION`."""
        ...


def add_noise(
    vector: NDArray[np.float32] | NDArray[np.float64],
    *,
    std: float,
    sensitivity: float,
    source: NoiseSource,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Release `vector` with Gaussian noise: the only way in which anything leaves with noise.

    Vector and noise are rounded to steps, see the top of the module; the noise multiplier, which
    is `std / sensitivity`, holds for the rounded vector.

    Args:
        vector: Any shape; what is released, already clipped.
        std: Standard deviation of the noise on each element, > 0: noise multiplier times
            sensitivity. What is added is larger by the little that rounding asks for.
        sensitivity: How far apart, in the Euclidean norm, the vectors of neighbours can be, > 0.
        source: Where the noise comes from.
        out: Where the result goes: contiguous, of the same shape, and possibly `vector` itself,
            of which then nothing is left without noise. None for a new array.

    Returns:
        An array of the same shape.

    Raises:
        ValueError: `std` or `sensitivity` is not positive and finite, or `vector` is not finite
            in single precision: an infinite or NaN element would show through any noise.
    """
    step = noise_step(std, sensitivity=sensitivity, size=np.size(vector))
    flat: NDArray[Any] = np.ascontiguousarray(vector).reshape(-1)
    released = np.empty(flat.size, dtype=np.float32) if out is None else out.reshape(-1)
    if released.size != flat.size or not (out is None or out.flags.c_contiguous):
        raise ValueError("out is contiguous and of the vector's shape")
    memory = np.empty(min(_CHUNK, flat.size), dtype=np.int32)
    for start in range(0, flat.size, _CHUNK):
        steps = memory[: flat.size - start]
        draw_steps(steps, source=source)
        for first in range(0, steps.size, BLOCK):
            drawn = steps[first : first + BLOCK]
            at = slice(start + first, start + first + drawn.size)
            _release(flat[at], drawn, step, released[at])
    return released.reshape(np.shape(vector))


def noise_step(std: float, *, sensitivity: float, size: int) -> float:
    """What vectors of `size` elements and their noise are rounded to multiples of.

    Raises:
        ValueError: `std` or `sensitivity` is no such number; or the noise would have to be twice as
            large for rounding's sake, which takes a noise multiplier times square root of the size
            beyond 1.5 million.
    """
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f"std must be positive and finite, got {std}")
    if not (sensitivity > 0 and math.isfinite(sensitivity)):
        raise ValueError(f"sensitivity must be positive and finite, got {sensitivity}")
    if not _FINEST < std < 1 / _FINEST:
        raise ValueError(f"std {std:g} cannot be told in single precision")
    # RESOLUTION steps = std + (std / sensitivity) * what rounding adds to the sensitivity. The 1
    # is for the constants that are rounded to single precision.
    deviation = RESOLUTION - 1 - _APART * std / sensitivity * math.sqrt(size)
    if deviation < RESOLUTION / 2:
        raise ValueError(
            f"noise {std / sensitivity:g} times the sensitivity on {size} elements: too fine"
        )
    return std / deviation


def draw_steps(out: NDArray[np.int32], *, source: NoiseSource) -> None:
    """Overwrite `out` with normal draws of standard deviation `RESOLUTION`, rounded."""
    # Not by isinstance: to hold a source against a protocol takes as long as a small draw.
    normal_steps = getattr(source, "normal_steps", None)
    if normal_steps is not None:
        normal_steps(out)
    else:
        out[:] = np.rint(source.gaussian(out.size, std=RESOLUTION))


def steps_per_unit(step: float) -> float:
    """What vectors are multiplied with: 1 / `step`, in single precision.

    The same for all parts of all vectors, whatever they are computed in.
    """
    return float(np.float32(1 / step))


def in_singles(largest: float, step: float, *, dtype: np.dtype[Any]) -> bool:
    """Whether what is at most `largest` in absolute value is rounded in single precision.

    Raises:
        ValueError: It is not finite in single precision.
    """
    if not largest <= _LARGEST:
        raise ValueError("a vector that is not finite cannot be released with noise")
    return dtype == np.float32 and largest < _SINGLES * step


def whole_sums(
    part: NDArray[Any], drawn: NDArray[np.int32], scale: Any, *, singles: bool
) -> NDArray[np.float32]:
    """`part`, in steps, rounded, and `drawn`, whose memory is used; in single precision.

    Args:
        part: Any shape.
        drawn: Of the same shape.
        scale: `steps_per_unit`, float32, one number or an array to broadcast.
        singles: As `in_singles` has it; how it was computed does not show in what is given.
    """
    if singles:
        scaled: NDArray[np.float32] = np.multiply(part, scale)
        np.rint(scaled, out=scaled)
        drawn += scaled.astype(np.int32)
        np.copyto(scaled, drawn)
        return scaled
    # A double in two parts, of 24 and 29 bits, whose products are exact. What the last addition
    # rounds is the sum, noise included, as is what follows it.
    upper = part.astype(np.float32)
    lower = np.subtract(part, upper, dtype=np.float64)
    lower *= scale
    np.rint(lower, out=lower)
    lower += drawn
    whole = np.multiply(upper, scale, dtype=np.float64)
    np.rint(whole, out=whole)
    whole += lower
    summed: NDArray[np.float32] = whole.astype(np.float32)
    return summed


def _release(
    part: NDArray[Any], drawn: NDArray[np.int32], step: float, out: NDArray[np.float32]
) -> None:
    """Round `part` to steps, add `drawn`, and write the sum to `out`."""
    largest = max(-float(part.min()), float(part.max()))
    singles = in_singles(largest, step, dtype=part.dtype)
    scaled = whole_sums(part, drawn, np.float32(steps_per_unit(step)), singles=singles)
    np.multiply(scaled, np.float32(step), out=out)
