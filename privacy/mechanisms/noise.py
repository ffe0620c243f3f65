"""Where randomness that protects comes from: one interface, two sources."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class NoiseSource(Protocol):
    """Draws that a mechanism needs. One source serves one site.

    Attributes:
        private: True only for the cryptographic source. What a source that is not private
            has touched must be stamped as not private.
    """

    private: bool

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float32]:
        """`size` draws of a normal distribution with mean 0 and standard deviation `std`."""
        ...

    def uniform(self, size: int) -> NDArray[np.float64]:
        """`size` draws from [0, 1), for Poisson sampling and for rounding."""
        ...
