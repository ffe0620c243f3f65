"""Real vectors as integers mod 2^32, so that their sums are exact and can be masked."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.stream import BitStream, in_parallel

_HALF: Final = 2**31
_SLACK: Final = 1 + 2**-20  # a clipped vector may be this much longer, by float32's rounding
_FRACTION: Final = 32  # bits after the point while rounding
# Adding it leaves a double whose unit in the last place is one granule, so that the processor
# rounds, and whose lower half is the integer in two's complement.
_ROUNDER: Final = 1.5 * 2.0 ** (52 + _FRACTION)
# Numbers at a time: of 2^14 to 2^18 the fastest. With fewer, two threads spend their time on
# handing each other Python's lock.
_CHUNK: Final = 1 << 17
_BLOCK: Final = 1 << 20  # numbers that one stream of random bits serves


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
        self,
        values: NDArray[np.float32] | NDArray[np.float64],
        *,
        bits: BitStream,
        out: NDArray[np.uint32] | None = None,
        threads: int | None = None,
    ) -> NDArray[np.uint32]:
        """Round each value up or down to a granule, so that it is right on average.

        The probability is exact to 2^-24. Rounding protects nobody; the bits need not be secret.

        Args:
            values: Shape `(length,)`; absolute values at most `bound`.
            bits: Where the randomness comes from.
            out: Where to write, shape `(length,)`; a new array by default.
            threads: How many share the work, by default the processors at hand; the result is the
                same for any number.

        Returns:
            Integers mod 2^32, shape `(length,)`.

        Raises:
            ValueError: A value is not finite or beyond the bound; clip first. `out` is undefined.
        """
        if values.ndim != 1:
            raise ValueError("values must have one dimension")
        result = np.empty(values.size, dtype=np.uint32) if out is None else out
        if result.shape != values.shape or result.dtype != np.uint32:
            raise ValueError("out must be of uint32 and of the shape of values")
        blocks = [
            (values[at : at + _BLOCK], result[at : at + _BLOCK], bits.fork())
            for at in range(0, values.size, _BLOCK)
        ]
        in_parallel(lambda block: self._encode(*block), blocks, threads=threads)
        return result

    def _encode(
        self,
        values: NDArray[np.float32] | NDArray[np.float64],
        out: NDArray[np.uint32],
        bits: BitStream,
    ) -> None:
        per_granule = 1 / self.granularity
        limit = self.bound * _SLACK + self.granularity
        if not (values.max() <= limit and values.min() >= -limit):
            raise ValueError(f"values must be finite and within {self.bound:g}; clip first")
        scaled = np.empty(min(_CHUNK, values.size), dtype=np.float64)
        for start in range(0, values.size, _CHUNK):
            part = values[start : start + _CHUNK]
            real = scaled[: part.size]
            np.multiply(part, per_granule * 2.0**_FRACTION, out=real, dtype=np.float64)
            # Uniform in [-1/2, 1/2) of a granule; then to the nearest.
            np.add(real, bits.words32(part.size).view(np.int32), out=real)
            real += _ROUNDER
            out[start : start + part.size] = real.view("<u4")[::2]

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """The real values of a sum."""
        return np.multiply(total.view(np.int32), self.granularity, dtype=np.float64)
