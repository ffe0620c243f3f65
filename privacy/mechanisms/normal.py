"""Normal draws, rounded to whole numbers, of no more random bits than the rounding leaves.

What is wanted is round(N) of a normal N whose standard deviation is `RESOLUTION`. The area under
N's density is cut into bricks of equal mass and a rest. A brick is 2**16 whole numbers wide and of
one height, and so many lie on each other as fit below the density. There are 2**16 bricks, so that
16 bits choose one and 16 more the place in it: where N falls into a brick, every whole number there
is equally likely, and bits below it would be rounded away. One draw in a hundred is from the rest:
from the wedges between bricks and density by rejection, and from the tails (Marsaglia, "Expressing
a random variable in terms of uniform random variables", 1961; here with bricks on a lattice).

Every draw has words of its own, and nothing relates it to another one. The longest draw is 12
standard deviations: the tail that is missing has probability below 1e-32.
"""

import functools
import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = Callable[[NDArray[np.uint64]], None]
"""Overwrites an array with uniform words, new ones at each call."""

RESOLUTION: Final = 3 << 21
"""Standard deviation of the draws before they are rounded."""

_BITS: Final = 16
_BRICKS: Final = 1 << _BITS
_WIDTH: Final = 1 << _BITS
_BLOCK: Final = 1 << 15  # draws that are worked on at a time: they stay in the second-level cache
_ENTRIES: Final = 1 << 12  # of the table of boxes, about
_COLUMNS_TO: Final = 5  # standard deviations; there are no bricks beyond 3.4, and boxes still
_BATCH: Final = 1 << 11  # draws that are in no brick are made together
_PER_ROOT: Final = 1 / (RESOLUTION * math.sqrt(2 * math.pi))
_UNIT: Final = 2.0**-53


class Bricks(NamedTuple):
    """How the area is cut.

    Attributes:
        first: The first whole number in each brick, shape `(65536,)`.
        rest: Probability that a draw is in no brick.
        left: Where columns begin, half below their first whole number, shape `(columns,)`.
        heights: Of the bricks in a column together, shape `(columns,)`.
        boxes: Columns, each as often as the height of its box, around what the density leaves
            above the bricks, asks for.
        tallest: How high a box is, shape `(columns,)`.
        tails: Where the tails begin, left and right.
        shares: Of boxes, and of boxes and right tail, in what proposals are made from.
    """

    first: NDArray[np.int32]
    rest: float
    left: NDArray[np.float64]
    heights: NDArray[np.float64]
    boxes: NDArray[np.int64]
    tallest: NDArray[np.float64]
    tails: tuple[float, float]
    shares: tuple[float, float]


class NormalSteps:
    """Rounded normal draws from a stream of words. Not for two threads at a time.

    Args:
        words: Where the randomness comes from.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._word = np.empty(0, dtype=np.uint64)
        self._brick = np.empty(0, dtype=np.int64)
        # Of draws to come: which ones are in no brick, counted from the next, and what those are.
        self._places = np.empty(0, dtype=np.int64)
        self._values = np.empty(0, dtype=np.int32)

    def fill(self, out: NDArray[np.int32]) -> None:
        """Overwrite `out`, contiguous, shape `(size,)`."""
        table = bricks()
        largest = min(_BLOCK, out.size)
        if self._brick.size < largest:
            self._word = np.empty((largest + 1) // 2, dtype=np.uint64)
            self._brick = np.empty(largest, dtype=np.int64)
        for start in range(0, out.size, _BLOCK):
            drawn = out[start : start + _BLOCK]
            word = self._word[: (drawn.size + 1) // 2]
            self._words(word)
            halves = word.view(np.uint16)
            brick = self._brick[: drawn.size]
            np.copyto(brick, halves[: drawn.size])
            np.take(table.first, brick, out=drawn, mode="clip")
            np.add(drawn, halves[drawn.size : 2 * drawn.size], out=drawn)
        # What is left here would say what the last draws were.
        self._word[: (largest + 1) // 2] = 0
        self._brick[:largest] = 0
        self._put_beyond(out)

    def _put_beyond(self, out: NDArray[np.int32]) -> None:
        """Overwrite what is in no brick; places and values are made for many draws at a time."""
        places = self._places
        while not places.size or places[-1] < out.size:
            last = int(places[-1]) if places.size else -1
            places = np.concatenate([places, last + gaps(_BATCH, self._words).cumsum()])
        count = int(np.searchsorted(places, out.size))
        while self._values.size < count:
            self._values = np.concatenate([self._values, beyond(2 * _BATCH, self._words)])
        out[places[:count]] = self._values[:count]
        self._places = places[count:] - out.size
        places[:count] = 0
        self._values[:count] = 0
        self._values = self._values[count:]


def gaps(size: int, words: Words) -> NDArray[np.int64]:
    """From one draw that is in no brick to the next, each independently of the others, >= 1."""
    drawn = np.log(_uniform(size, words))
    drawn *= 1 / math.log1p(-bricks().rest)
    steps = drawn.astype(np.int64)
    steps += 1
    return steps


def beyond(proposals: int, words: Words) -> NDArray[np.int32]:
    """Draws of what the bricks leave of the density, rounded: about .6 of the proposals."""
    return np.rint(_proposals(proposals, words)).astype(np.int32)


def _proposals(size: int, words: Words) -> NDArray[np.float64]:
    """Those of `size` proposals that are below the density and above the bricks."""
    table = bricks()
    across, up = _uniform(2 * size, words).reshape(2, size)
    place = across * (table.boxes.size / table.shares[0])
    entry = place.astype(np.int64)
    column = np.take(table.boxes, entry, mode="clip")
    place -= entry
    x = np.take(table.left, column)
    place *= _WIDTH
    x += place
    height = np.take(table.tallest, column)
    height *= up
    height += np.take(table.heights, column)
    keep = height < _density(x)
    tail = np.flatnonzero(across >= table.shares[0])
    if tail.size:
        # Marsaglia 1964: an exponential tail about the normal one.
        right = across[tail] < table.shares[1]
        start = np.where(right, table.tails[1], -table.tails[0]) / RESOLUTION
        excess = -np.log(_uniform(tail.size, words)) / start
        x[tail] = np.where(right, start + excess, -start - excess) * RESOLUTION
        keep[tail] = up[tail] < np.exp(-0.5 * excess * excess)
    return x[keep]


def _uniform(size: int, words: Words) -> NDArray[np.float64]:
    """Odd multiples of 2**-54 between 0 and 1: neither end is reached."""
    word = np.empty(size, dtype=np.uint64)
    words(word)
    word >>= np.uint64(11)
    drawn = word.astype(np.float64)
    drawn += 0.5
    drawn *= _UNIT
    return drawn


def _density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    exponent = x * (1 / RESOLUTION)
    exponent *= exponent
    exponent *= -0.5
    np.exp(exponent, out=exponent)
    exponent *= _PER_ROOT
    return exponent


@functools.cache
def bricks() -> Bricks:
    """The table, which takes two milliseconds."""
    columns = 8 * RESOLUTION // _WIDTH
    first: NDArray[np.int64] = np.arange(-columns, columns) * _WIDTH
    left = first.astype(np.float64) - 0.5
    at_left, at_right = _density(left), _density(left + _WIDTH)
    lowest = np.minimum(at_left, at_right)
    # The largest mass of a brick at which there are enough of them.
    low, high = 0.9 / _BRICKS, 1 / _BRICKS
    while (mass := (low + high) / 2) not in (low, high):
        enough = np.floor(lowest * (_WIDTH / mass)).sum() >= _BRICKS
        low, high = (mass, high) if enough else (low, mass)
    count = np.floor(lowest * (_WIDTH / low)).astype(np.int64)
    count[count.argmax()] -= count.sum() - _BRICKS
    used = np.abs(first) <= _COLUMNS_TO * RESOLUTION
    first, left, count = first[used], left[used], count[used]
    heights = count.astype(np.float64) * (low / _WIDTH)
    # At an edge, but for the one column that 0 is in.
    top = np.where(first == 0, _PER_ROOT, np.maximum(at_left, at_right)[used])
    unit = (top - heights).sum() / _ENTRIES
    entries = np.ceil((top - heights) / unit).astype(np.int64)
    tails = (float(left[0]), float(left[-1]) + _WIDTH)
    around = _density(np.array(tails)) * RESOLUTION**2 / np.abs(tails)
    boxes = float(entries.sum()) * unit * _WIDTH
    proposed = boxes + float(around.sum())
    return Bricks(
        first=np.repeat(first, count).astype(np.int32),
        rest=1 - _BRICKS * low,
        left=left,
        heights=heights,
        boxes=np.repeat(np.arange(count.size), entries),
        tallest=entries * unit,
        tails=tails,
        shares=(boxes / proposed, float(boxes + around[1]) / proposed),
    )
