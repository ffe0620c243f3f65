"""Normal draws out of uniform words, in a few passes over memory.

The area under the density is cut into 4096 parts of equal mass. 4086 are upright strips that lie
below the curve, of one height each; what is left, the wedges between strips and curve and the two
tails, fills the other ten. A word's lowest bits choose a part, and the whole word the place in a
strip, so that one draw in four hundred alone needs a logarithm or a comparison with the curve
(Marsaglia, "Expressing a random variable in terms of uniform random variables", 1961; here with
strips of equal mass, so that the choice is one look into a table).

Every draw has words of its own, and nothing relates it to another one. In a strip, which is at
most a third of a standard deviation wide, 2**52 places are equally likely, so more than 1e11 of
them lie in 2**-17 standard deviations; beyond the strips a draw has three words and more. The
longest draw is 14 standard deviations: the tail that is missing has probability below 1e-43.
"""

import functools
import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = Callable[[NDArray[np.uint64]], None]
"""Overwrites an array with uniform words, new ones at each call."""

_BITS: Final = 12
_PARTS: Final = 1 << _BITS
_BLOCK: Final = 1 << 15  # draws that are worked on at a time: they stay in the second-level cache
_PER_ROOT: Final = 1 / math.sqrt(2 * math.pi)
_PROPOSALS: Final = 2048  # for draws outside of the strips, at a time; .65 of them are taken


class Strips(NamedTuple):
    """The parts; `n` strips on each side.

    Attributes:
        places: Shape `(4096,)`, complex: a strip's centre and, as imaginary part, its width in
            units of 2**-64; zero for the parts that are no strip.
        strips: How many parts are strips.
        edges: Where strips begin, from 0, and where the last one ends, shape `(n + 1,)`.
        heights: Of the strips, below the density at their outer edges, shape `(n,)`.
        upper: The density at their inner edges, shape `(n,)`.
        boxes: Around wedges: left edge, width, lower edge, height, shape `(n + 1, 4)`; the last
            one stands for the tail and holds nothing.
        shares: Mass of the boxes around wedges and of the curve around the tail, summed up and
            divided by their sum, shape `(n + 1,)`.
    """

    places: NDArray[np.complex128]
    strips: int
    edges: NDArray[np.float64]
    heights: NDArray[np.float64]
    upper: NDArray[np.float64]
    boxes: NDArray[np.float64]
    shares: NDArray[np.float64]


class NormalDraws:
    """Normal draws from a stream of words. Not for two threads at a time.

    Args:
        words: Where the randomness comes from.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._chosen = np.empty(0, dtype=np.int64)
        self._place = np.empty(0, dtype=np.complex128)
        self._outside = np.empty(0)

    def fill(self, out: NDArray[np.float64], *, std: float) -> None:
        """Overwrite `out` with draws of standard deviation `std`.

        Args:
            out: Contiguous, shape `(size,)`.
            std: > 0.
        """
        parts = strips()
        places = parts.places if std == 1 else parts.places * std
        largest = min(_BLOCK, out.size)
        if self._chosen.size < largest:
            self._chosen = np.empty(largest, dtype=np.int64)
            self._place = np.empty(largest, dtype=np.complex128)
        for start in range(0, out.size, _BLOCK):
            drawn = out[start : start + _BLOCK]
            chosen, place = self._chosen[: drawn.size], self._place[: drawn.size]
            word = drawn.view(np.int64)
            self._words(drawn.view(np.uint64))
            np.bitwise_and(word, _PARTS - 1, out=chosen)
            np.take(places, chosen, out=place, mode="clip")
            # From -1/2 to 1/2 of the width. The bits that chose the strip move this by less than
            # a part in 2^52 of it.
            np.copyto(drawn, word)
            drawn *= place.imag
            drawn += place.real
            at = np.flatnonzero(chosen >= parts.strips)
            drawn[at] = self._beyond(at.size) * std
        # What is left here would say in which strips the last draws were.
        self._chosen[:largest] = 0
        self._place[:largest] = 0

    def _beyond(self, size: int) -> NDArray[np.float64]:
        """Draws from outside of the strips, a few of many that are made at a time."""
        while self._outside.size < size:
            self._outside = np.append(self._outside, beyond_strips(self._words))
        drawn = self._outside[:size].copy()
        self._outside[:size] = 0
        self._outside = self._outside[size:]
        return drawn


def beyond_strips(words: Words) -> NDArray[np.float64]:
    """Some draws from what the strips leave of the standard normal density, by rejection."""
    parts = strips()
    end = parts.edges[-1]
    word = np.empty((3, _PROPOSALS), dtype=np.uint64)
    words(word.reshape(-1))
    sign = 1.0 - 2.0 * (word[0] & np.uint64(1)).astype(np.float64)
    word >>= np.uint64(12)  # 52 bits, so that halves are exact and 1 is not reached
    which, across, up = (word.view(np.int64) + 0.5) * 2.0**-52
    box = np.searchsorted(parts.shares, which, side="right")
    left, width, low, height = np.take(parts.boxes, box, axis=0).T
    x = left + width * across
    keep = low + height * up < _PER_ROOT * np.exp(-0.5 * x * x)
    # Marsaglia 1964: an exponential tail about the normal one.
    tail = np.flatnonzero(box == len(parts.heights))
    excess = -np.log(across[tail]) / end
    x[tail] = end + excess
    keep[tail] = up[tail] < np.exp(-0.5 * excess * excess)
    x *= sign
    kept: NDArray[np.float64] = x[keep]
    return kept


@functools.cache
def strips() -> Strips:
    """The table, which takes twenty milliseconds."""
    edges = [0.0]
    while (width := _width(edges[-1])) is not None:
        edges.append(edges[-1] + width)
    edge, wide = np.array(edges), np.diff(edges)
    count = 2 * wide.size
    places = np.zeros(_PARTS, dtype=np.complex128)
    centres = edge[:-1] + wide / 2
    places[:count] = np.concatenate([centres, -centres]) + 1j * np.tile(wide * 2.0**-64, 2)
    heights = 1 / (_PARTS * wide)
    upper = _PER_ROOT * np.exp(-0.5 * edge[:-1] ** 2)
    around_tail = _PER_ROOT * math.exp(-0.5 * edges[-1] ** 2) / edges[-1]
    mass = np.append(wide * (upper - heights), around_tail).cumsum()
    boxes = np.zeros((wide.size + 1, 4))
    boxes[:-1] = np.column_stack([edge[:-1], wide, heights, upper - heights])
    return Strips(places, count, edge, heights, upper, boxes, mass / mass[-1])


def _width(start: float) -> float | None:
    """The least width at which a strip from `start`, as high as its outer edge, has its mass."""
    width = 0.0
    while True:
        wider = 1 / (_PARTS * _PER_ROOT * math.exp(-0.5 * (start + width) ** 2))
        if wider > 1:
            return None  # too far out: no strip of this mass lies below the curve
        if wider <= width * (1 + 1e-15):
            return max(width, wider)
        width = wider
