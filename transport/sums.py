"""What is summed under secure aggregation, and what the sum means: both ends must agree on it."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedward.core.study import AggregationSection, Study
from fedward.privacy.accounting import calibrate
from fedward.privacy.mechanisms.distributed import DistributedGaussian
from fedward.privacy.mechanisms.encoding import FixedPoint
from fedward.privacy.mechanisms.stream import BitStream
from fedward.privacy.secagg import Degree, choose_degree, least_threshold
from fedward.privacy.secagg.terms import MAX_COMPLETE
from fedward.strategies.strategy import Vector

_WEIGHT_STEPS = 16  # of a patient: a weight is a public number, so its rounding harms nobody


class SumCodec(Protocol):
    """A site's vector and its weight as integers mod 2^32, and their sum as a mean update."""

    @property
    def granularity(self) -> float:
        """The value of one granule; both ends must have the same."""
        ...

    def encode(self, vector: Vector, *, weight: float, bits: BitStream) -> NDArray[np.uint32]:
        """What a site adds to the sum, shape `(num_parameters + 1,)`."""
        ...

    def decode(self, total: NDArray[np.uint32]) -> tuple[Vector, float]:
        """The weighted mean update of the sites in a sum, and their weight.

        Raises:
            ValueError: The sum holds no weight.
        """
        ...


@dataclass(frozen=True, slots=True)
class UpdateSum:
    """A sum of weighted updates.

    Coordinates beyond `max_update` and weights beyond `max_weight` are cut; what is not finite
    counts as zero, for one such number would spoil the sum for everybody.
    """

    bounds: AggregationSection
    encoding: FixedPoint

    @property
    def granularity(self) -> float:
        """Of a weighted coordinate in [-1, 1]."""
        return self.encoding.granularity

    def encode(self, vector: Vector, *, weight: float, bits: BitStream) -> NDArray[np.uint32]:
        """Of a site's update; see `SumCodec`."""
        most = self.bounds.max_update
        share = min(weight, self.bounds.max_weight) / self.bounds.max_weight
        values = np.nan_to_num(vector.astype(np.float64), posinf=0.0, neginf=0.0)
        values = np.clip(values, -most, most) / most
        return self.encoding.encode(np.append(values * share, share), bits=bits)

    def decode(self, total: NDArray[np.uint32]) -> tuple[Vector, float]:
        """See `SumCodec`."""
        values = self.encoding.decode(total)
        share = float(values[-1])
        if share <= 0:
            raise ValueError("the sum holds no weight")
        mean = values[:-1] / share * self.bounds.max_update
        return mean.astype(np.float32), share * self.bounds.max_weight


@dataclass(frozen=True, slots=True)
class GradientSum:
    """A sum of clipped gradients in which every site has put its share of discrete noise.

    One step of DP-SGD on everybody's patients: the step is taken where the sum is.
    """

    bounds: AggregationSection
    mechanism: DistributedGaussian
    sample_rate: float
    learning_rate: float

    @property
    def granularity(self) -> float:
        """Of a gradient."""
        return self.mechanism.granularity

    def encode(self, vector: Vector, *, weight: float, bits: BitStream) -> NDArray[np.uint32]:
        """Of a site's sum of clipped gradients, with its noise; see `SumCodec`."""
        largest = self.bounds.max_weight
        # Cutting moves no two neighbours further apart; it holds for more patients than promised.
        most = largest * self.mechanism.clip_norm
        noisy = self.mechanism.privatise(
            np.clip(vector, -most, most), largest_batch=largest, bits=bits
        )
        steps = round(min(weight, largest) * _WEIGHT_STEPS)
        return np.append(noisy, np.uint32(steps))

    def decode(self, total: NDArray[np.uint32]) -> tuple[Vector, float]:
        """See `SumCodec`."""
        weight = float(total[-1]) / _WEIGHT_STEPS
        if weight <= 0:
            raise ValueError("the sum holds no weight")
        fixed = self.mechanism.fixed_point(largest_batch=self.bounds.max_weight)
        gradient = fixed.decode(total[:-1]) / (self.sample_rate * weight)
        return (-self.learning_rate * gradient).astype(np.float32), weight


@dataclass(frozen=True, slots=True)
class SiteSum:
    """A sum of whole updates, of each site the same weight, with a share of noise of every site.

    DP-FedAvg (McMahan, Ramage, Talwar and Zhang, ICLR 2018, Algorithm 1) with everybody in every
    round and the noise of Kairouz, Liu and Steinke 2021. The sum is divided by the public number
    of sites in the roster, also where some are missing, so that a site that is taken away moves
    the mean by its own part alone.
    """

    mechanism: DistributedGaussian
    sites: int

    @property
    def granularity(self) -> float:
        """Of an update."""
        return self.mechanism.granularity

    def encode(self, vector: Vector, *, weight: float, bits: BitStream) -> NDArray[np.uint32]:  # noqa: ARG002 (of a site's size nothing leaves)
        """Of a site's update, clipped to the bound, with its noise; see `SumCodec`."""
        clipped = clip_whole(vector, clip_norm=self.mechanism.clip_norm)
        noisy = self.mechanism.privatise(clipped, largest_batch=1, bits=bits)
        # Who is in a sum, the coordinator knows in any case.
        return np.append(noisy, np.uint32(1))

    def decode(self, total: NDArray[np.uint32]) -> tuple[Vector, float]:
        """The sum over the number of all sites, and how many are in it; see `SumCodec`."""
        present = int(total[-1])
        if not 1 <= present <= self.sites:
            raise ValueError(f"the sum is said to hold {present} of {self.sites} sites")
        fixed = self.mechanism.fixed_point(largest_batch=1)
        return (fixed.decode(total[:-1]) / self.sites).astype(np.float32), float(present)


def clip_whole(update: Vector, *, clip_norm: float) -> NDArray[np.float64]:
    """A site's whole update, scaled down to an L2 norm of `clip_norm` if it is longer.

    One that is not finite is zero as a whole: of what is left of it nothing is known.

    Args:
        update: Shape `(num_parameters,)`.
        clip_norm: `[privacy] clip_norm` of the study.
    """
    wide = update.astype(np.float64)
    if not np.isfinite(wide).all():
        return np.zeros(update.shape)
    length = float(np.linalg.norm(wide))
    return wide if length <= clip_norm else wide * (clip_norm / length)


def clip_by_norm(update: Vector, *, clip_norm: float | None) -> Vector:
    """An update scaled down to an L2 norm of `clip_norm`, if it is longer and there is one.

    What is not finite counts as zero, as it does in the sum.

    Args:
        update: Shape `(num_parameters,)`.
        clip_norm: `[aggregation] clip_norm` of the study.
    """
    if clip_norm is None:
        return update
    wide = np.nan_to_num(update.astype(np.float64), posinf=0.0, neginf=0.0)
    length = float(np.linalg.norm(wide))
    return update if length <= clip_norm else (wide * (clip_norm / length)).astype(np.float32)


def sum_codec(study: Study, *, sites: int, size: int) -> SumCodec:
    """The codec of a study, the same at every site and at the coordinator.

    Args:
        study: What is trained.
        sites: Sites in the roster.
        size: Number of parameters.
    """
    if study.privacy.mode == "distributed":
        mechanism = distributed_mechanism(study, sites=sites, size=size)
        if study.protects_sites:
            return SiteSum(mechanism, sites)
        return GradientSum(
            study.aggregation,
            mechanism,
            sample_rate=study.training.sample_rate or 0.0,
            learning_rate=study.training.learning_rate,
        )
    encoding = FixedPoint.choose(bound=1.0, sites=sites, length=size + 1)
    return UpdateSum(study.aggregation, encoding)


def sharing(*, sites: int) -> Degree | None:
    """The graph on which more than 64 sites share masks; None if everybody does with everybody."""
    return None if sites <= MAX_COMPLETE else choose_degree(sites)


def fewest_sites(study: Study, *, sites: int) -> int:
    """The fewest sites that a sum may hold: with fewer the round is void."""
    degree = sharing(sites=sites)
    threshold = (
        least_threshold(sites, study.aggregation.adversary) if degree is None else degree.threshold
    )
    return max(study.aggregation.min_sites, threshold)


def released_rate(study: Study) -> float:
    """With which probability a unit is in a round's sum: every site always is, and pays for it."""
    return 1.0 if study.protects_sites else study.training.sample_rate or 1.0


def distributed_mechanism(study: Study, *, sites: int, size: int) -> DistributedGaussian:
    """The noise of a study in mode "distributed": enough for the fewest sites in a sum.

    Raises:
        ValueError: There are fewer sites than may not be missing.
    """
    privacy = study.privacy
    wanted = calibrate(
        epsilon=privacy.epsilon or math.inf,
        delta=privacy.delta,
        sample_rate=released_rate(study),
        steps=study.study.rounds,
        beside_epsilon=None if study.monitor is None else study.monitor.epsilon,
    )
    return shared_noise(
        noise_multiplier=wanted,
        clip_norm=privacy.clip_norm,
        length=size,
        sites=sites,
        dropouts=sites - fewest_sites(study, sites=sites),
        colluders=privacy.colluders,
        # Of units: a site's vector is the sum of its patients', or its own alone.
        largest_batch=1 if study.protects_sites else study.aggregation.max_weight,
    )


# Sites ask again in every round, and the search for the scale takes some milliseconds.
shared_noise = cache(DistributedGaussian.calibrate)
