"""Draws of many simulated sources at once, in machine code: word for word what each draws alone.

A simulated site draws a few numbers a step, so that nearly all of the time goes into what leads to
them: calls of NumPy, and a generator that is set up for each site. Here one call draws for all. The
words are those of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011), to the bit those of `numpy.random.Philox`: a counter, encrypted under the site's key.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.compiled import compiled, intrinsic
from fedward.privacy.mechanisms.normal import BLOCK, bricks, put, words_for

Keys = NDArray[np.uint64]
"""Of each source its key, shape `(sources, 2)`, contiguous."""

Used = NDArray[np.int64]
"""How many words of its stream each source has used, shape `(sources,)`; calls add to it."""

_WEYL_0: Final = np.uint64(0x9E3779B97F4A7C15)
_WEYL_1: Final = np.uint64(0xBB67AE8584CAA73B)
_FACTOR_0: Final = np.uint64(0xD2E7470EE14C6C93)
_FACTOR_1: Final = np.uint64(0xCA5A826395121157)
_ROUNDS: Final = 10
_ZERO: Final = np.uint64(0)
_ONE: Final = np.uint64(1)
_SURPLUS: Final = np.uint64(11)
_UNIT: Final = 2.0**-53


def uniform_rows(
    keys: Keys, used: Used, counts: NDArray[np.int64], out: NDArray[np.float64]
) -> None:
    """Overwrite the first `counts` numbers of each row with uniform ones of [0, 1).

    Args:
        keys: Of each row's source.
        used: Likewise.
        counts: Shape `(sources,)`, none above the length of a row.
        out: Shape `(sources, size)`, contiguous.
    """
    size = out.shape[1]
    if len(out) != len(keys) or counts.max(initial=0) > size:
        raise ValueError(f"{len(keys)} sources do not fill {out.shape} with {counts} numbers")
    flat = out.reshape(-1)
    _uniform_rows(keys.reshape(-1), used, counts, size, flat, flat.view(np.uint64))


def normal_rows(keys: Keys, used: Used, out: NDArray[np.int32]) -> None:
    """Overwrite each row with rounded normal draws, as `draw_normal` does.

    Args:
        keys: Of each row's source.
        used: Likewise.
        out: Shape `(sources, size)`, contiguous.
    """
    size = out.shape[1]
    if len(out) != len(keys):
        raise ValueError(f"{len(keys)} sources do not fill {len(out)} rows")
    column, rest, uncovered = bricks()
    whole, last = words_for(BLOCK, rest), words_for(size % BLOCK, rest)
    words = np.empty(whole if size >= BLOCK else last, np.uint64)
    lay, flat = words.view(np.uint32), out.reshape(-1)
    _normal_rows(keys.reshape(-1), used, words, lay, flat, size, whole, last, column, *uncovered)
    words.fill(0)


# Arrays come flat, and twice where they are looked at as two types: to compile a slice or a view
# takes longer than all of the arithmetic.


@compiled("void(uint64[::1], int64[::1], int64[::1], int64, float64[::1], uint64[::1])")
def _uniform_rows(  # noqa: PLR0917 (compiled code knows no keywords)
    keys: NDArray[np.uint64],
    used: Used,
    counts: NDArray[np.int64],
    size: int,
    out: NDArray[np.float64],
    words: NDArray[np.uint64],
) -> None:
    """See `uniform_rows`; `words` is the memory of `out`."""
    for row in range(used.size):
        start, stop = row * size, row * size + counts[row]
        fill(keys[2 * row], keys[2 * row + 1], used[row], words, start, stop)
        used[row] += counts[row]
        for place in range(start, stop):
            out[place] = np.float64(words[place] >> _SURPLUS) * _UNIT


@compiled(
    "void(uint64[::1], int64[::1], uint64[::1], uint32[::1], int32[::1], int64, int64, int64,"
    " int16[::1], int64[::1], float64[::1], float64[::1], float64[::1], float64, float64, float64,"
    " float64, float64)"
)
def _normal_rows(  # noqa: PLR0917 (as above)
    keys: NDArray[np.uint64],
    used: Used,
    words: NDArray[np.uint64],
    lay: NDArray[np.uint32],
    out: NDArray[np.int32],
    size: int,
    whole: int,
    last: int,
    column: NDArray[np.int16],
    boxes: NDArray[np.int64],
    left: NDArray[np.float64],
    heights: NDArray[np.float64],
    tallest: NDArray[np.float64],
    boxes_to: float,
    right_from: float,
    left_edge: float,
    right_edge: float,
    per_gap: float,
) -> None:
    """See `normal_rows` and `put`.

    `lay` is the memory of `words`; `whole` and `last` are how many a block takes, and the last one.
    """
    for row in range(used.size):
        for start in range(row * size, (row + 1) * size, BLOCK):
            drawn = out[start : min(start + BLOCK, (row + 1) * size)]
            one_each, stop = (drawn.size + 1) // 2, whole if drawn.size == BLOCK else last
            begin, place = 0, -1
            while place < drawn.size:
                fill(keys[2 * row], keys[2 * row + 1], used[row], words, begin, stop)
                used[row] += stop - begin
                begin = one_each
                place = put(
                    lay,
                    column,
                    words[one_each:stop],
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


def _make_upper_half() -> Any:
    import numba
    from llvmlite import ir
    from numba.extending import intrinsic

    word, wide = numba.types.uint64, ir.IntType(128)

    def upper_half(_: Any, left: Any, right: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, words: Any) -> Any:
            product = builder.mul(*(builder.zext(word, wide) for word in words))
            return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

        return word(left, right), generate

    return intrinsic(upper_half)


@intrinsic(_make_upper_half)
def upper_half(left: np.uint64, right: np.uint64) -> np.uint64:
    """The upper 64 bits of a product of unsigned words, for which NumPy and numba have no name."""
    return np.uint64(int(left) * int(right) >> 64)


@compiled("void(uint64, uint64, int64, uint64[::1], int64, int64)")
def fill(  # noqa: PLR0917 (as above)
    key_0: np.uint64,
    key_1: np.uint64,
    used: int,
    words: NDArray[np.uint64],
    start: int,
    stop: int,
) -> None:
    """Overwrite `words` from `start` to `stop` with those of a stream after the first `used`.

    A counter gives four words; NumPy counts before it encrypts, so that its first counter is 1.
    """
    place, counter = start - used % 4, np.uint64(used // 4)
    while place < stop:
        counter += _ONE
        a, b, c, d = counter, _ZERO, _ZERO, _ZERO
        k, m = key_0, key_1
        for _ in range(_ROUNDS):
            e, f = upper_half(_FACTOR_0, a), upper_half(_FACTOR_1, c)
            a, b, c, d = f ^ b ^ k, _FACTOR_1 * c, e ^ d ^ m, _FACTOR_0 * a
            k += _WEYL_0
            m += _WEYL_1
        if start <= place:
            words[place] = a
        if start <= place + 1 < stop:
            words[place + 1] = b
        if start <= place + 2 < stop:
            words[place + 2] = c
        if place + 3 < stop:
            words[place + 3] = d
        place += 4
