"""Real vectors as integers mod 2^32, so that their sums are exact and can be masked."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.stream import BitStream

_HALF: Final = 2**31
_FRACTION: Final = 32  # bits after the point while rounding
_SLACK: Final = 1 + 2**-20  # a clipped vector may be this much longer, by float32's rounding
_CHUNK: Final = 1 << 15  # numbers at a time: all temporaries stay in cache


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPoint:
    """Values as multiples of a granularity, rounded up or down at random without bias.

    A negative number is its two's complement, so that sums wrap around and still come out right
    as long as the true sum is below 2^31 granules either way.

    Attributes:
        granularity: The value of one granule, > 0.
        bound: The largest absolute value that a coordinate may have.
    """

    granularity: float
    bound: float

    def __post_init__(self) -> None:
        """Check. Raises `ValueError`."""
        if not (self.granularity > 0 and self.bound > 0 and math.isfinite(self.bound)):
            raise ValueError("granularity and bound must be positive")
        if self.bound / self.granularity >= _HALF:
            raise ValueError("the bound is 2^31 granules or more; make the granularity larger")

    @classmethod
    def choose(
        cls,
        *,
        bound: float,
        sites: int,
        length: int,
        noise_std: float = 0.0,
        overflow_bits: float = 40,
    ) -> "FixedPoint":
        """The finest granularity with which a sum overflows with probability below 2^-bits.

        Without noise it never does. Noise is taken as subgaussian, which Gaussian and discrete
        Gaussian noise and their sums are, and the bound is a union over the coordinates.

        Args:
            bound: Largest absolute value of a coordinate; the clip norm is one.
            sites: Largest number of vectors in a sum.
            length: Coordinates of a vector.
            noise_std: Standard deviation of all the noise in the sum.
            overflow_bits: The wanted probability, as -log2.
        """
        if sites < 1 or length < 1 or noise_std < 0:
            raise ValueError("sites and length must be 1 or more, and noise_std 0 or more")
        deviations = math.sqrt(2 * (math.log(2 * length) + overflow_bits * math.log(2)))
        largest = sites * bound * _SLACK + deviations * noise_std
        return cls(granularity=largest / (_HALF - 1 - 2 * sites), bound=bound)

    def overflow_log2(self, *, sites: int, length: int, noise_std: float = 0.0) -> float:
        """log2 of a bound on the probability that a sum of `sites` vectors overflows anywhere."""
        # A site's integer is at most its bound, one granule of rounding, and one of slack.
        room = (_HALF - 1 - 2 * sites) * self.granularity - sites * self.bound * _SLACK
        if room < 0:
            return 0.0
        if noise_std == 0:
            return -math.inf
        return min(0.0, 1 + math.log2(length) - (room / noise_std) ** 2 / (2 * math.log(2)))

    def rounding_error(self, sites: int) -> float:
        """A sum differs from the plain sum of the same vectors by less than this, always."""
        return sites * self.granularity

    def encode(
        self, values: NDArray[np.float32] | NDArray[np.float64], *, bits: BitStream
    ) -> NDArray[np.uint32]:
        """Round each value up or down to a granule, so that it is right on average.

        The probability is exact to 2^-25. Rounding protects nobody; the bits need not be secret.

        Args:
            values: Any shape; absolute values at most `bound`.
            bits: Where the randomness comes from.

        Returns:
            Integers mod 2^32, of the same shape.

        Raises:
            ValueError: A value is not finite or beyond the bound; clip first.
        """
        flat = np.ascontiguousarray(values).reshape(-1)
        out = np.empty(flat.size, dtype=np.uint32)
        per_granule = 2.0**_FRACTION / self.granularity
        limit = (self.bound / self.granularity * _SLACK + 1) * 2.0**_FRACTION
        scaled = np.empty(min(_CHUNK, flat.size), dtype=np.float64)
        fixed = np.empty(scaled.size, dtype=np.int64)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            real, whole = scaled[: part.size], fixed[: part.size]
            np.multiply(part, per_granule, out=real, dtype=np.float64)
            if not (real.max() <= limit and real.min() >= -limit):
                raise ValueError(f"values must be finite and within {self.bound:g}; clip first")
            np.copyto(whole, real, casting="unsafe")
            whole += bits.words32(part.size)
            whole >>= _FRACTION
            np.copyto(out[start : start + part.size], whole, casting="unsafe")
        return out.reshape(values.shape)

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """The real values of a sum."""
        return np.multiply(total.view(np.int32), self.granularity, dtype=np.float64)
