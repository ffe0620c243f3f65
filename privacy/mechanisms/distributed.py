"""Distributed discrete Gaussian noise: every site adds a share, and only the sum is seen.

Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with
Secure Aggregation", ICML 2021, with patients in place of clients. docs/distributed-noise.md derives
everything here on a page.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.accounting import (
    DpEvent,
    PrivacySpent,
    Unit,
    compose,
    dp_sgd_event,
    privacy_spent,
)
from fedward.privacy.mechanisms.discrete import (
    LARGEST_STD,
    DiscreteGaussian,
    log_ratio_of_sum,
    periodic_excess,
)
from fedward.privacy.mechanisms.encoding import FixedPoint
from fedward.privacy.mechanisms.stream import BitStream

SMOOTHING: Final = 2.5
"""Granules of Gaussian that the proof gives away, so that the rest is a continuous Gaussian."""

_FINEST_SHARE: Final = 2.0**18  # granules in a share's standard deviation: beyond, nothing is won
_ROUNDING_FAILURE: Final = 2.0**-80
_COMPUTED: Final = 1 + 2**-16  # a clip norm that was computed in float32 may be this much longer
_ATTEMPTS: Final = 1000
_MOST_EXTRA: Final = 1.5  # times the noise: a coarser granule than that is no bargain


def largest_rounded_norm(
    *, clip_norm: float, granularity: float, length: int, failure: float
) -> float:
    """How long a vector of norm `clip_norm` can be after rounding, except with a probability.

    Kairouz, Liu and Steinke 2021, lemma 4, or norm plus granularity times sqrt(length), always.

    Args:
        clip_norm: The vector's L2 norm.
        granularity: The value of a granule.
        length: Coordinates.
        failure: Probability of a longer one.
    """
    spread = granularity * math.sqrt(length)
    usually = (
        clip_norm**2
        + spread**2 / 4
        + math.sqrt(2 * math.log(1 / failure)) * granularity * (clip_norm + spread / 2)
    )
    return min(math.sqrt(usually), clip_norm + spread)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedGaussian:
    """What every site adds, and what it is worth.

    Attributes:
        clip_norm: L2 bound of a unit's contribution before rounding.
        share_std: Standard deviation of one site's noise, in the units of `clip_norm`.
        granularity: The value of a granule.
        length: Coordinates of a vector.
        honest: Sites whose noise counts: the fewest survivors, less those that collude.
    """

    clip_norm: float
    share_std: float
    granularity: float
    length: int
    honest: int

    def __post_init__(self) -> None:
        """Check. Raises `ValueError`."""
        if not (self.clip_norm > 0 and self.granularity > 0 and self.length >= 1):
            raise ValueError("clip_norm, granularity and length must be positive")
        if self.honest < 1:
            raise ValueError("at least one site's noise must count")
        share = self.share_std / self.granularity
        if not 2 * SMOOTHING <= share <= LARGEST_STD:
            raise ValueError(
                f"a share of {share:g} granules; {2 * SMOOTHING:g} to {LARGEST_STD:g} are allowed"
            )

    @classmethod
    def calibrate(
        cls,
        *,
        noise_multiplier: float,
        clip_norm: float,
        length: int,
        sites: int,
        dropouts: int,
        colluders: int = 0,
        largest_batch: int,
    ) -> "DistributedGaussian":
        """The share of every site such that the fewest survivors reach a noise multiplier.

        Each adds variance / (sites - colluders - dropouts), so that more survivors than the fewest
        mean more noise than needed, and never less.

        Args:
            noise_multiplier: Wanted for the sum: what pooled DP-SGD would use.
            clip_norm: L2 bound of a unit's contribution.
            length: Coordinates of a vector.
            sites: Sites asked in a round.
            dropouts: Most of them that may be missing; with more the round is void.
            colluders: Survivors whose noise the adversary knows.
            largest_batch: Most units of a site that one vector can hold: all of its patients.

        Raises:
            ValueError: Nobody's noise is left, or integers of 32 bits are too small for it.
        """
        honest = sites - dropouts - colluders
        if honest < 1 or min(dropouts, colluders, largest_batch - 1) < 0:
            raise ValueError("dropouts and colluders must leave at least one honest survivor")
        if noise_multiplier <= 0:
            raise ValueError("noise_multiplier must be positive")
        share = noise_multiplier * clip_norm / math.sqrt(honest)
        for _ in range(64):  # a fixed point: a coarser granule needs more noise
            fixed = FixedPoint.choose(
                bound=clip_norm * largest_batch,
                sites=sites,
                length=length,
                noise_std=share * math.sqrt(sites),
            )
            granularity = max(fixed.granularity, share / _FINEST_SHARE)
            longest = largest_rounded_norm(
                clip_norm=clip_norm * _COMPUTED,
                granularity=granularity,
                length=length,
                failure=_ROUNDING_FAILURE,
            )
            needed = math.hypot(noise_multiplier * longest, SMOOTHING * granularity)
            if needed / math.sqrt(honest) <= share:
                return cls(
                    clip_norm=clip_norm,
                    share_std=share,
                    granularity=granularity,
                    length=length,
                    honest=honest,
                )
            share = needed / math.sqrt(honest) * (1 + 1e-6)
            if share > _MOST_EXTRA * noise_multiplier * clip_norm / math.sqrt(honest):
                break
        raise ValueError("integers of 32 bits are too small for this batch, length and noise")

    def against(self, *, survivors: int, colluders: int) -> "DistributedGaussian":
        """The same noise, valued for who survived and who tells the adversary its share."""
        return replace(self, honest=survivors - colluders)

    @property
    def sampler(self) -> DiscreteGaussian:
        """One site's noise, in granules."""
        return DiscreteGaussian(self.share_std / self.granularity)

    @property
    def sensitivity(self) -> float:
        """L2 norm, after rounding, of what a unit changes, except with probability 2^-80."""
        return largest_rounded_norm(
            clip_norm=self.clip_norm * _COMPUTED,
            granularity=self.granularity,
            length=self.length,
            failure=_ROUNDING_FAILURE,
        )

    @property
    def noise_multiplier(self) -> float:
        """Of the continuous Gaussian whose sum says at least as much as this one."""
        variance = self.honest * self.share_std**2 - (SMOOTHING * self.granularity) ** 2
        return math.sqrt(variance) / self.sensitivity

    def event(self, *, sample_rate: float, steps: int) -> DpEvent:
        """`steps` rounds in which every unit takes part with probability `sample_rate`.

        Price it at `remaining_delta(...)` in place of delta.
        """
        return dp_sgd_event(
            noise_multiplier=self.noise_multiplier, sample_rate=sample_rate, steps=steps
        )

    def slack(self, *, steps: int) -> tuple[float, float]:
        """What the discrete sum adds to the continuous one: (log ratio, total variation).

        In all `steps` rounds together: each probability changes by at most a factor e^±ratio, and
        then by at most the total variation.
        """
        share = self.share_std / self.granularity
        sampler = self.sampler
        excess = periodic_excess(SMOOTHING)
        ratio = (
            math.log1p(2 * excess / (1 - excess))
            + log_ratio_of_sum([share] * self.honest)
            + self.honest * sampler.log_ratio
        )
        variation = self.length * self.honest * sampler.total_variation + _ROUNDING_FAILURE
        return steps * self.length * ratio, steps * variation

    def remaining_delta(self, *, delta: float, epsilon: float, steps: int) -> float:
        """The delta to price the continuous mechanism at, so that `delta` holds for this one.

        Args:
            delta: The whole.
            epsilon: An upper bound on the epsilon that will come out.
            steps: Rounds.

        Raises:
            ValueError: Nothing remains.
        """
        ratio, variation = self.slack(steps=steps)
        remains = (delta - (1 + math.exp(epsilon)) * variation) * math.exp(-ratio)
        if remains <= 0:
            raise ValueError(f"the discrete noise alone fails with {variation:g}, over delta")
        return remains

    def spent(
        self,
        *,
        sample_rate: float,
        steps: int,
        delta: float,
        unit: Unit,
        beside: "DistributedGaussian | None" = None,
    ) -> PrivacySpent:
        """An upper bound on epsilon after `steps` rounds, everything included.

        With `beside`, also after one release of everybody under that mechanism.

        Raises:
            ValueError: An argument is outside its range, or epsilon is 20 or more.
        """
        return self.bound(
            lambda event, remains: privacy_spent(event, delta=remains, unit=unit),
            sample_rate=sample_rate,
            steps=steps,
            delta=delta,
            beside=beside,
        )

    def bound(
        self,
        price: Callable[[DpEvent, float], PrivacySpent],
        *,
        sample_rate: float,
        steps: int,
        delta: float,
        beside: "DistributedGaussian | None" = None,
        ceiling: float = 20.0,
    ) -> PrivacySpent:
        """As `spent`, by another price of the continuous mechanism.

        So for whom more than a unit changes, such as a patient with several records: several units'
        vectors are rounded as one, and several times the sensitivity of one bounds what becomes of
        them (docs/distributed-noise.md, step 6).

        Args:
            price: Of an event and a delta.
            sample_rate: As in `event`.
            steps: Rounds.
            delta: The whole.
            beside: A mechanism of which everybody is in one release.
            ceiling: Epsilons from here on are refused: e to the power of it, times the distance
                from the continuous mechanism, is what delta pays for the discrete one.

        Raises:
            ValueError: Delta does not pay for the ceiling, or epsilon is not below it.
        """
        remains = self.remaining_delta(delta=delta, epsilon=ceiling, steps=steps)
        event = self.event(sample_rate=sample_rate, steps=steps)
        ratio, _ = self.slack(steps=steps)
        if beside is not None:
            remains = beside.remaining_delta(delta=remains, epsilon=ceiling, steps=1)
            event = compose([event, beside.event(sample_rate=1.0, steps=1)])
            ratio += beside.slack(steps=1)[0]
        found = price(event, remains)
        if not max(found.epsilon, found.epsilon_rdp) < ceiling:
            raise ValueError(f"epsilon is {found.epsilon:g}; add noise")
        return replace(
            found,
            epsilon=found.epsilon + 2 * ratio,
            epsilon_rdp=found.epsilon_rdp + 2 * ratio,
            delta=delta,
        )

    def fixed_point(self, *, largest_batch: int) -> FixedPoint:
        """The encoding of a site's sum."""
        return FixedPoint(granularity=self.granularity, bound=self.clip_norm * largest_batch)

    def privatise(
        self,
        total: NDArray[np.float32] | NDArray[np.float64],
        *,
        largest_batch: int,
        bits: BitStream,
        out: NDArray[np.uint32] | None = None,
    ) -> NDArray[np.uint32]:
        """A site's sum of clipped contributions, rounded, with the site's noise, mod 2^32.

        Args:
            total: Shape `(length,)`.
            largest_batch: As in `calibrate`.
            bits: A secure stream.
            out: Where to write; a new array by default.

        Raises:
            ValueError: The shape is wrong or a coordinate is beyond the bound.
        """
        if total.shape != (self.length,):
            raise ValueError(f"total must be of shape ({self.length},)")
        encoded = self.fixed_point(largest_batch=largest_batch).encode(total, bits=bits, out=out)
        np.add(encoded, self.sampler.sample(self.length, bits=bits).astype(np.uint32), out=encoded)
        return encoded


def round_conditionally(
    vector: NDArray[np.float64],
    *,
    clip_norm: float,
    granularity: float,
    bits: BitStream,
    failure: float = math.exp(-0.5),
) -> NDArray[np.int64]:
    """Round one contribution at random, again and again until it is not too long.

    For a unit whose own vector is rounded, such as a whole site: then the sensitivity holds
    always (Kairouz, Liu and Steinke 2021, algorithm 1).

    Args:
        vector: Norm at most `clip_norm`, shape `(length,)`.
        clip_norm: The bound before rounding.
        granularity: The value of a granule.
        bits: Where the randomness comes from.
        failure: Bound on the probability that one attempt is too long.

    Returns:
        Granules, of norm at most `largest_rounded_norm(...) / granularity`.

    Raises:
        ValueError: The vector is longer than `clip_norm`.
    """
    if not np.linalg.norm(vector) <= clip_norm * _COMPUTED:
        raise ValueError(f"the vector is longer than {clip_norm:g}; clip first")
    limit = largest_rounded_norm(
        clip_norm=clip_norm, granularity=granularity, length=vector.size, failure=failure
    )
    fixed = FixedPoint(granularity=granularity, bound=clip_norm)
    for _ in range(_ATTEMPTS):
        rounded = fixed.encode(vector, bits=bits).view(np.int32).astype(np.int64)
        if math.sqrt(float((rounded.astype(np.float64) ** 2).sum())) * granularity <= limit:
            return rounded
    raise ValueError(f"no rounding of {_ATTEMPTS} was short enough")
