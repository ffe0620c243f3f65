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

from fedward.privacy.mechanisms.compiled import compiled

Words = Callable[[NDArray[np.uint64]], None]
"""Overwrites an array with uniform words, new ones at each call."""

RESOLUTION: Final = 3 << 21
"""Standard deviation of the draws before they are rounded."""

_BITS: Final = 16
_BRICKS: Final = 1 << _BITS
_WIDTH: Final = 1 << _BITS
BLOCK: Final = 1 << 16
"""Draws at a time: enough for what a call costs, few enough for the cache."""

_ENTRIES: Final = 1 << 12  # of the table of boxes, about
_COLUMNS_TO: Final = 5  # standard deviations; there are no bricks beyond 3.4, and boxes still
_PER_ROOT: Final = 1 / (RESOLUTION * math.sqrt(2 * math.pi))
_LOWER: Final = np.uint32(_BRICKS - 1)
_UPPER: Final = np.uint32(_BITS)
_SURPLUS: Final = np.uint64(11)
_UNIT: Final = 2.0**-53  # uniform numbers are odd multiples of half of this


class Uncovered(NamedTuple):
    """What the bricks leave of the area, and what proposals for it are made of.

    Attributes:
        boxes: Columns, each as often as the height of its box, around what the density leaves
            above the bricks, asks for.
        left: Where columns begin, half below their first whole number, shape `(columns,)`.
        heights: Of the bricks in a column together, shape `(columns,)`.
        tallest: How high a box is, shape `(columns,)`.
        boxes_to: Share of the boxes in what is proposed.
        right_from: Share of the boxes and the left tail.
        left_edge: Where the left tail ends.
        right_edge: Where the right tail begins.
        per_gap: 1 / log(1 - mass): from one draw that is uncovered to the next it is 1 and the
            whole part of this times the logarithm of a uniform number.
    """

    boxes: NDArray[np.int64]
    left: NDArray[np.float64]
    heights: NDArray[np.float64]
    tallest: NDArray[np.float64]
    boxes_to: float
    right_from: float
    left_edge: float
    right_edge: float
    per_gap: float


class Bricks(NamedTuple):
    """How the area is cut.

    Attributes:
        column: Which one a brick is in, that is, its first whole number over its width, shape
            `(65536,)`.
        rest: Probability that a draw is in no brick.
        uncovered: Where that is.
    """

    column: NDArray[np.int16]
    rest: float
    uncovered: Uncovered


class NormalDraws:
    """Rounded normal draws from a stream of words.

    Attributes:
        words: The stream.
    """

    def __init__(self, words: Words) -> None:
        self.words = words

    def __call__(self, out: NDArray[np.int32]) -> None:
        """See `draw_normal`."""
        draw_normal(out, self.words)


def draw_normal(out: NDArray[np.int32], words: Words) -> None:
    """Overwrite `out`, contiguous, shape `(size,)`, with rounded normal draws.

    Nothing of a draw is left anywhere else.
    """
    column, share, uncovered = bricks()
    memory = np.empty(words_for(min(BLOCK, out.size), share), np.uint64)
    for start in range(0, out.size, BLOCK):
        drawn = out[start : start + BLOCK]
        given = memory if out.size <= BLOCK else memory[: words_for(drawn.size, share)]
        words(given)
        one_each = (drawn.size + 1) // 2
        lay, rest = given.view(np.uint32), given[one_each:]
        place = put(lay, column, rest, *uncovered, drawn, -1)
        while place < drawn.size:
            words(rest)
            place = put(lay, column, rest, *uncovered, drawn, place)
    memory.fill(0)


def words_for(draws: int, rest: float) -> int:
    """One for two draws, and what those that are in no brick need; seldom they need more."""
    return (draws + 1) // 2 + 16 + int(8 * rest * draws)


@compiled(
    "int64(uint32[::1], int16[::1], uint64[::1], int64[::1], float64[::1], float64[::1],"
    " float64[::1], float64, float64, float64, float64, float64, int32[::1], int64)"
)
def put(  # noqa: PLR0917 (compiled code knows no keywords)
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
    out: NDArray[np.int32],
    place: int,
) -> int:
    """Overwrite `out` with draws from bricks, and then those that are in none.

    Each draw is in no brick independently of the others. Such a one is made by rejection, and .6 of
    the proposals are kept; each has four words, of which the last says how far it is to the next
    draw that is in no brick.

    Args:
        lay: Uniform, at least as many as draws: half of a word chooses the brick, half the place.
        column: As in `Bricks`.
        words: Uniform.
        boxes: As in `Uncovered`, like what follows.
        left: See there.
        heights: See there.
        tallest: See there.
        boxes_to: See there.
        right_from: See there.
        left_edge: See there.
        right_edge: See there.
        per_gap: See there.
        out: Draws.
        place: -1 where all begins; else of the draw in no brick to go on from.

    Returns:
        The size of `out` or more; or, if there were too few words, the place to go on from.
    """
    if place < 0:
        for number in range(out.size):
            word = lay[number]
            out[number] = np.int32(column[word & _LOWER]) * _WIDTH + np.int32(word >> _UPPER)
    for at in range(0, words.size - 3, 4):
        if place >= out.size:
            break
        across = (np.float64(words[at] >> _SURPLUS) + 0.5) * _UNIT
        up = (np.float64(words[at + 1] >> _SURPLUS) + 0.5) * _UNIT
        if across < boxes_to:
            along = across * (boxes.size / boxes_to)
            entry = int(along)
            over = boxes[entry]
            x = left[over] + (along - entry) * _WIDTH
            bell = math.exp(-0.5 * (x / RESOLUTION) * (x / RESOLUTION)) * _PER_ROOT
            keep = heights[over] + up * tallest[over] < bell
        else:
            # Marsaglia 1964: an exponential tail about the normal one.
            edge = left_edge if across < right_from else right_edge
            further = (np.float64(words[at + 2] >> _SURPLUS) + 0.5) * _UNIT
            excess = -math.log(further) * RESOLUTION / edge
            x = edge + excess * RESOLUTION
            keep = up < math.exp(-0.5 * excess * excess)
        if keep or place < 0:
            if place >= 0:
                out[place] = math.floor(x + 0.5)
            gap = (np.float64(words[at + 3] >> _SURPLUS) + 0.5) * _UNIT
            place += 1 + int(math.log(gap) * per_gap)
    return place


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
    edges = np.array([left[0], left[-1] + _WIDTH])
    around = _density(edges) * RESOLUTION**2 / np.abs(edges)
    boxes = float(entries.sum()) * unit * _WIDTH
    proposed = boxes + float(around.sum())
    rest = 1 - _BRICKS * low
    uncovered = Uncovered(
        boxes=np.repeat(np.arange(count.size), entries),
        left=left,
        heights=heights,
        tallest=entries * unit,
        boxes_to=boxes / proposed,
        right_from=(boxes + float(around[0])) / proposed,
        left_edge=float(edges[0]),
        right_edge=float(edges[1]),
        per_gap=1 / math.log1p(-rest),
    )
    return Bricks(np.repeat(first // _WIDTH, count).astype(np.int16), rest, uncovered)
