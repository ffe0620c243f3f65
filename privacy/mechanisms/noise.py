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

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.compiled import compiled
from fedward.privacy.mechanisms.normal import (
    BLOCK,
    RESOLUTION,
    NormalDraws,
    Words,
    bricks,
    put,
    words_for,
)

_APART: Final = 2
"""Steps by which an element of two neighbours' vectors can be farther apart after rounding.

Each is moved by a half when it is rounded, and, in double precision, by a half once more, see
`release`.
"""

_FOR_RELEASE: Final = ("C", "A", "W")
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


Draw = Callable[[NDArray[np.int32]], None]
"""Overwrites an array, contiguous, with rounded normal draws of standard deviation `RESOLUTION`."""


class DrawsSteps(NoiseSource, Protocol):
    """A source that draws what `add_noise` adds, without a detour over doubles."""

    def drawing(self, size: int) -> AbstractContextManager[Draw]:
        """One request, of `size` draws in parts: until its end the source is nobody else's."""
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
    step = noise_step(std, sensitivity=sensitivity, size=vector.size)
    given = vector if vector.flags.carray else np.require(vector, requirements=_FOR_RELEASE)
    flat: NDArray[Any] = given.reshape(-1)
    released = np.empty(flat.size, dtype=np.float32) if out is None else out.reshape(-1)
    if released.size != flat.size or not (out is None or out.flags.c_contiguous):
        raise ValueError("out is contiguous and of the vector's shape")
    with drawing(source, flat.size) as draw:
        if isinstance(draw, NormalDraws):
            _release_in_blocks(flat, draw.words, step, released)
        else:
            drawn = np.empty(flat.size, dtype=np.int32)
            draw(drawn)
            release_steps(flat, drawn, step, released)
            drawn.fill(0)
    return released.reshape(vector.shape)


def _release_in_blocks(
    flat: NDArray[Any], words: Words, step: float, out: NDArray[np.float32]
) -> None:
    """As `release_steps` of what `draw_normal` gives, one call of machine code a block."""
    upper, lower = _halves(flat)
    column, share, uncovered = bricks()
    scale, step32 = steps_per_unit(step), np.float32(step)
    drawn = np.empty(min(BLOCK, flat.size), dtype=np.int32)
    memory = np.empty(words_for(drawn.size, share), np.uint64)
    for start in range(0, flat.size, BLOCK):
        size = min(BLOCK, flat.size - start)
        given, steps = memory[: words_for(size, share)], drawn[:size]
        words(given)
        lay, rest = given.view(np.uint32), given[(size + 1) // 2 :]
        place = -1
        while place < size:
            place = _draw_and_release(
                lay, column, rest, *uncovered, steps, place, upper, lower, scale, step32, out, start
            )
            if place == _NOT_FINITE:
                raise ValueError(_REFUSAL)
            if place < size:
                words(rest)
    drawn.fill(0)
    memory.fill(0)


def release_steps(
    part: NDArray[Any], drawn: NDArray[np.int32], step: float, out: NDArray[np.float32]
) -> None:
    """Overwrite `out` with `part`, rounded to steps, and what was drawn; shape `(size,)`.

    Raises:
        ValueError: `part` is not finite.
    """
    upper, lower = _halves(part)
    if not release(upper, lower, drawn, steps_per_unit(step), np.float32(step), out):
        raise ValueError(_REFUSAL)


@functools.lru_cache(maxsize=64)
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


def drawing(source: NoiseSource, size: int) -> AbstractContextManager[Draw]:
    """`DrawsSteps.drawing`, of any source."""
    # Not by isinstance: to hold a source against a protocol takes as long as a small draw.
    own: Callable[[int], AbstractContextManager[Draw]] | None = getattr(source, "drawing", None)
    if own is not None:
        return own(size)

    def draw(out: NDArray[np.int32]) -> None:
        out[:] = np.rint(source.gaussian(out.size, std=RESOLUTION))

    return nullcontext(draw)


def steps_per_unit(step: float) -> float:
    """What vectors are multiplied with: 1 / `step`, in single precision.

    The same for all parts of all vectors, whatever they are computed in.
    """
    return float(np.float32(1 / step))


def _halves(part: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A double in two parts, of 24 and 29 bits; of single precision there is no second one."""
    if part.dtype == np.float32:
        return part, _NOTHING
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
        upper: NDArray[np.float32] = part.astype(np.float32)
        return upper, np.subtract(part, upper, dtype=np.float64)


@compiled("boolean(float32[::1], float64[::1], int32[::1], float64, float32, float32[::1])")
def release(  # noqa: PLR0917 (compiled code knows no keywords)
    upper: NDArray[np.float32],
    lower: NDArray[np.float64],
    drawn: NDArray[np.int32],
    scale: float,
    step: np.float32,
    out: NDArray[np.float32],
) -> bool:
    """Round to steps, add what was drawn, and overwrite `out` with the sum.

    A double holds the products exactly, of 24 bits and 24 or 29, so that each is rounded once. What
    the additions round is the sum, noise included, as is what follows them.

    Args:
        upper: What is released, shape `(size,)`.
        lower: To be added to `upper`, and rounded by itself, shape `(size,)`; or empty.
        drawn: Whole numbers, shape `(size,)`.
        scale: `steps_per_unit`.
        step: In single precision.
        out: May be `upper`.

    Returns:
        Whether all of `upper` is finite; if not, `out` is good for nothing.
    """
    finite = True
    for place in range(out.size):
        value = np.float64(upper[place])
        finite &= bool(abs(value) <= _LARGEST)
        noise = np.float64(drawn[place])
        if lower.size > 0:
            noise += np.rint(lower[place] * scale)
        out[place] = np.float32(np.rint(value * scale) + noise) * step
    return finite


@compiled(
    "int64(uint32[::1], int16[::1], uint64[::1], int64[::1], float64[::1], float64[::1],"
    " float64[::1], float64, float64, float64, float64, float64, int32[::1], int64, float32[::1],"
    " float64[::1], float64, float32, float32[::1], int64)"
)
def _draw_and_release(  # noqa: PLR0917 (compiled code knows no keywords)
    lay: NDArray[np.uint32],
    column: NDArray[np.int16],
    words: NDArray[np.uint64],
    boxes: NDArray[np.int64],
    left: NDArray[np.float64],
    heights: NDArray[np.float64],
    tallest: NDArray[np.float64],
    boxes_to: float,
    right_from: float,
    left_edge: float,
    right_edge: float,
    per_gap: float,
    drawn: NDArray[np.int32],
    place: int,
    upper: NDArray[np.float32],
    lower: NDArray[np.float64],
    scale: float,
    step: np.float32,
    out: NDArray[np.float32],
    start: int,
) -> int:
    """`put`, and, if its words were enough, `release` of as many elements from `start` on.

    Returns:
        What `put` returns, or `_NOT_FINITE`.
    """
    place = put(
        lay,
        column,
        words,
        boxes,
        left,
        heights,
        tallest,
        boxes_to,
        right_from,
        left_edge,
        right_edge,
        per_gap,
        drawn,
        place,
    )
    if place < drawn.size:
        return place
    stop = start + drawn.size
    rest = lower[start:stop] if lower.size > 0 else lower
    if not release(upper[start:stop], rest, drawn, scale, step, out[start:stop]):
        return _NOT_FINITE
    return place


_NOTHING: Final = np.empty(0, np.float64)
_NOT_FINITE: Final = -2
_REFUSAL: Final = "a vector that is not finite cannot be released with noise"
