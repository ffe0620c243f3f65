"""Discrete Gaussian noise: integers z with probability proportional to exp(-z^2 / (2 std^2)).

Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020. The
fast sampler inverts the distribution function by table, exactly to a stated distance; the exact
one of their algorithms 1 to 3 is its oracle.
"""

import decimal
import functools
import math
import secrets
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.stream import BitStream

_TAIL: Final = 13  # standard deviations in a table: what is beyond has probability below 2^-120
_WORD: Final = 64
_DIGITS: Final = 90  # decimal digits while a table is computed
_GUIDE_BITS: Final = 16
_LARGEST_TABLE: Final = 512.0
_RATIO: Final = 2.2  # fine part's deviation over the coarse part's step; see `DiscreteGaussian`
_BLOCK: Final = 1 << 16  # samples at a time, so that the words stay in cache
LARGEST_STD: Final = 2.0**20


def periodic_excess(std: float) -> float:
    """How far, relatively, the sum over integers of a Gaussian's density is from its integral.

    For any centre y, sum over k of exp(-(k - y)^2 / 2 std^2) lies within a factor 1 ± this of
    sqrt(2 pi) std: Poisson's summation formula gives 2 sum over m >= 1 of exp(-2 pi^2 std^2 m^2).
    """
    if std < 1:
        raise ValueError("the bound is for standard deviations of 1 or more")
    # The terms after the first add less than a part in 10^20 of it.
    return 2.000001 * math.exp(-2 * (math.pi * std) ** 2)


def log_ratio_of_sum(stds: list[float]) -> float:
    """How far a sum of discrete Gaussians is from one of the same total variance.

    Each probability of the one is within a factor e^±this of the other's (Kairouz, Liu and
    Steinke, ICML 2021, theorem 9; here by `periodic_excess`, which is as tight).
    """
    total, variance = 0.0, stds[0] ** 2
    for std in stds[1:]:
        middle = math.sqrt(variance * std**2 / (variance + std**2))
        variance += std**2
        excess = periodic_excess(middle)
        total += math.log1p(2 * excess / (1 - excess))
    return total


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The distribution function of |z| <= reach, in units of 2^-128, as two words each.

    Attributes:
        reach: Largest absolute value.
        high: The upper words, ascending, shape `(2 reach,)`: entry k belongs to z <= k - reach.
        low: The lower words.
        guide: For each value of a random word's uppermost bits, the sample; or -1 if the bits
            below decide, shape `(65536,)`.
    """

    reach: int
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    guide: NDArray[np.int32]


class DiscreteGaussian:
    """A sampler of the discrete Gaussian.

    Up to a standard deviation of 512 one table serves. Beyond, a sample is `step` times a coarse
    one plus a fine one: their sum is a discrete Gaussian up to a factor e^±`log_ratio` if the fine
    part spreads over 2.2 steps (Micciancio and Walter, CRYPTO 2017; `log_ratio_of_sum`'s argument).

    Args:
        std: The parameter, 1 to 2^20; the standard deviation to 10^-8.

    Attributes:
        std: The parameter.
        total_variation: A sample's distance from the discrete Gaussian, beside `log_ratio`.
        log_ratio: Each probability is within e^±this of the discrete Gaussian's.
    """

    def __init__(self, std: float) -> None:
        if not 1 <= std <= LARGEST_STD:
            raise ValueError(f"std must be 1 to {LARGEST_STD:g} granules, got {std:g}")
        self.std = std
        if std <= _LARGEST_TABLE:
            self.step, self.log_ratio = 0, 0.0
            self._fine, self._coarse = _table(std), None
            tables = [self._fine]
        else:
            self.step = round(math.sqrt(std / _RATIO))
            fine = _RATIO * self.step
            # Rounded up: more noise than asked is the safe side.
            coarse = math.sqrt(std**2 - fine**2) / self.step * (1 + 2**-50)
            # In steps the fine part is 2.2 wide; together with the coarse one 2.19.
            middle = 1 / math.sqrt(coarse**-2 + (self.step / fine) ** 2)
            excess = periodic_excess(middle)
            self.log_ratio = math.log1p(2 * excess / (1 - excess))
            self._fine, self._coarse = _table(fine), _table(coarse)
            tables = [self._fine, self._coarse]
        # A threshold is off by less than 2^-128, and the tails are cut off.
        cut = 2 * math.exp(-(_TAIL**2) / 2)
        self.total_variation = sum(cut + len(table.high) * 2.0**-128 for table in tables)

    def sample(self, size: int, *, bits: BitStream) -> NDArray[np.int64]:
        """`size` independent samples.

        Args:
            size: How many.
            bits: A secure stream, if the noise is to protect.
        """
        out = np.empty(size, dtype=np.int64)
        for start in range(0, size, _BLOCK):
            part = out[start : start + _BLOCK]
            part[:] = _draw(self._fine, part.size, bits)
            if self._coarse is not None:
                part += np.multiply(_draw(self._coarse, part.size, bits), self.step, dtype=np.int64)
        return out


def _draw(table: _Table, size: int, bits: BitStream) -> NDArray[np.int32]:
    words = bits.words64(size)
    found: NDArray[np.int32] = table.guide[words >> np.uint64(_WORD - _GUIDE_BITS)]
    open_at = np.flatnonzero(found < 0)
    rest = words[open_at]
    place = np.searchsorted(table.high, rest, side="left")
    # A word that equals a threshold's upper half is decided by the next 64 bits.
    tied = np.flatnonzero(table.high[np.minimum(place, len(table.high) - 1)] == rest)
    for at in tied:
        place[at] += _break_tie(table, int(rest[at]), int(bits.words64(1)[0]))
    found[open_at] = place
    found -= table.reach
    return found


def _break_tie(table: _Table, high: int, low: int) -> int:
    """How many of the thresholds with upper word `high` are at or below (high, low)."""
    equal = np.flatnonzero(table.high == np.uint64(high))
    return int(np.count_nonzero(table.low[equal] <= np.uint64(low)))


@functools.lru_cache(maxsize=16)
def _table(std: float) -> _Table:
    """The table for a standard deviation, computed to 2^-128."""
    reach = math.ceil(_TAIL * std)
    with decimal.localcontext() as context:
        context.prec = _DIGITS
        exponent = -1 / (2 * Decimal(std) ** 2)
        # exp(-k^2 / 2 std^2) by ratios: exp(-(2k+1) / 2 std^2), each the last times one constant.
        ratio, shrink = exponent.exp(), (2 * exponent).exp()
        half = [Decimal(1)]
        for _ in range(reach):
            half.append(half[-1] * ratio)
            ratio *= shrink
        weights = half[:0:-1] + half
        unit = Decimal(2) ** 128 / sum(weights)
        running, thresholds = Decimal(0), []
        for weight in weights[:-1]:
            running += weight
            thresholds.append(int(running * unit))
    high = np.array([t >> _WORD for t in thresholds], dtype=np.uint64)
    low = np.array([t & (2**_WORD - 1) for t in thresholds], dtype=np.uint64)
    edges = np.arange(2**_GUIDE_BITS, dtype=np.uint64) << np.uint64(_WORD - _GUIDE_BITS)
    lowest = np.searchsorted(high, edges, side="left")
    last = edges + np.uint64(2 ** (_WORD - _GUIDE_BITS) - 1)
    highest = np.searchsorted(high, last, side="right")
    guide = np.where(lowest == highest, lowest, -1).astype(np.int32)
    return _Table(reach, high, low, guide)


def exact_discrete_gaussian(variance: Fraction) -> int:
    """One sample, exact, by rational arithmetic (Canonne, Kamath and Steinke 2020, algorithm 3).

    Some 50 microseconds; for tests, and for a noise that must be exact.

    Args:
        variance: The parameter sigma^2, > 0.
    """
    if variance <= 0:
        raise ValueError("variance must be positive")
    scale = math.isqrt(variance.numerator // variance.denominator) + 1
    while True:
        candidate = _discrete_laplace(scale)
        gap = abs(candidate) - variance / scale
        if _bernoulli_exp(gap * gap / (2 * variance)):
            return candidate


def _discrete_laplace(scale: int) -> int:
    """Their algorithm 2."""
    while True:
        within = secrets.randbelow(scale)
        if not _bernoulli_exp(Fraction(within, scale)):
            continue
        whole = 0
        while _bernoulli_exp(Fraction(1)):
            whole += 1
        magnitude = within + scale * whole
        negative = secrets.randbelow(2) == 1
        if not (negative and magnitude == 0):
            return -magnitude if negative else magnitude


def _bernoulli_exp(exponent: Fraction) -> bool:
    """True with probability exp(-exponent); their algorithm 1."""
    while exponent > 1:
        if not _bernoulli_exp(Fraction(1)):
            return False
        exponent -= 1
    count = 1
    while secrets.randbelow(exponent.denominator * count) < exponent.numerator:
        count += 1
    return count % 2 == 1
