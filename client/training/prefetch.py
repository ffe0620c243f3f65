"""Small draws of a cryptographic source taken out of a large one.

A request of a few numbers costs a secure source some sixty microseconds, whatever their
number, which is half of a step of a logistic regression.
"""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.noise import Draw, NoiseSource, drawing

_LARGEST = 1 << 14  # numbers held at a time; larger requests gain nothing


class Prefetched:
    """A `NoiseSource` that draws ahead from `source`, for one round of training.

    Every number is used once. The order in which numbers of `source` are used changes, so this
    is for sources that do not repeat.

    Args:
        source: Where the numbers come from.
        steps: How often a request of the same size will come, about.
    """

    def __init__(self, source: NoiseSource, *, steps: int) -> None:
        self.private = source.private
        self._source = source
        self._rounds = steps
        self._normal: NDArray[np.int32] = np.zeros(0, np.int32)
        self._uniform: NDArray[np.float64] = np.zeros(0)

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:
        """See `NoiseSource`."""
        return np.asarray(self._source.gaussian(size, std=std), dtype=np.float64)

    def drawing(self, size: int) -> AbstractContextManager[Draw]:
        """See `DrawsSteps`."""
        if size > _LARGEST // 2:
            return drawing(self._source, size)
        if len(self._normal) < size:
            self._normal = np.empty(self._ahead(size), np.int32)
            with drawing(self._source, self._normal.size) as draw:
                draw(self._normal)
        return nullcontext(self._take)

    def _take(self, out: NDArray[np.int32]) -> None:
        out[:] = self._normal[: out.size]
        self._normal = self._normal[out.size :]

    def uniform(self, size: int) -> NDArray[np.float64]:
        """See `NoiseSource`."""
        if size > _LARGEST // 2:
            return self._source.uniform(size)
        if len(self._uniform) < size:
            self._uniform = self._source.uniform(self._ahead(size))
        drawn, self._uniform = self._uniform[:size], self._uniform[size:]
        return drawn

    def _ahead(self, size: int) -> int:
        return min(self._rounds * size, _LARGEST // size * size) if size else 0


def drawing_ahead(source: NoiseSource, *, steps: int) -> NoiseSource:
    """`source`, drawn ahead if it protects; one that repeats keeps its order of draws."""
    return Prefetched(source, steps=steps) if source.private and steps > 1 else source
