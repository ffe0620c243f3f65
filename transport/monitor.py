"""Reference histograms for drift: how they are noised and summed. Both ends must agree on it.

Noise is calibrated to what one unit can move all histograms together, docs/privacy.md.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedward.core.study import Study
from fedward.privacy.accounting import calibrate_gaussian
from fedward.privacy.mechanisms.distributed import DistributedGaussian
from fedward.privacy.mechanisms.encoding import FixedPoint
from fedward.privacy.mechanisms.stream import BitStream
from fedward.strategies.strategy import Vector
from fedward.tasks.reference import Layout, layout, size
from fedward.tasks.registry import get_task
from fedward.transport.sums import fewest_sites, shared_noise

_HEADROOM = 16  # standard deviations of a site's own noise that its counts have room for


def monitor_layout(study: Study) -> Layout:
    """The histograms that a study asks for. Raises `ValueError` if it asks for none."""
    if study.monitor is None:
        raise ValueError("the study has no [monitor]")
    return layout(get_task(study.study.task).schema, bins=study.monitor.bins)


def monitor_records(study: Study) -> int:
    """The most rows of one unit that are counted, in histograms and in metrics."""
    return 1 if study.privacy.unit == "record" else study.privacy.max_records


def monitor_sensitivity(study: Study) -> float:
    """How far one unit moves all histograms together, in L2 norm.

    Each of its rows moves one cell of each histogram by one.
    """
    return monitor_records(study) * math.sqrt(len(monitor_layout(study)))


def metrics_sensitivity(study: Study) -> float:
    """How far one held-out unit moves the counts of metrics together, in L2 norm.

    Each of its rows adds one to a cell of everybody's and to at most one of each field's subgroups.
    """
    return monitor_records(study) * math.sqrt(1 + len(study.evaluation.subgroups))


def monitor_round(study: Study) -> int:
    """The number of the exchange in which histograms are released: one after training."""
    return study.study.rounds + 1


def local_monitor_noise(study: Study) -> float:
    """Noise multiplier of a site that noises its histograms by itself; 0 without privacy."""
    if study.monitor is None or study.monitor.epsilon is None:
        return 0.0
    return calibrate_gaussian(epsilon=study.monitor.epsilon, delta=study.privacy.delta)


def monitor_mechanism(study: Study, *, sites: int) -> DistributedGaussian:
    """The noise of the histograms in mode "distributed": enough for the fewest sites in a sum.

    Raises:
        ValueError: There are fewer sites than may not be missing.
    """
    return shared_noise(
        noise_multiplier=local_monitor_noise(study),
        clip_norm=monitor_sensitivity(study),
        length=size(monitor_layout(study)),
        sites=sites,
        dropouts=sites - fewest_sites(study, sites=sites),
        colluders=study.privacy.colluders,
        largest_batch=study.aggregation.max_weight,
    )


@dataclass(frozen=True, slots=True)
class CountSum:
    """A sum of histograms: counts, which a site has noised already where the study is private."""

    encoding: FixedPoint

    @property
    def granularity(self) -> float:
        """Of a count."""
        return self.encoding.granularity

    def encode(self, vector: Vector, *, weight: float, bits: BitStream) -> NDArray[np.uint32]:
        """Counts beyond the bound are cut, which is post-processing; see `SumCodec`."""
        bound = self.encoding.bound
        cut = np.clip(vector.astype(np.float64), -bound, bound)
        return self.encoding.encode(np.append(cut, min(weight, bound)), bits=bits)

    def decode(self, total: NDArray[np.uint32]) -> tuple[Vector, float]:
        """The sum, not the mean, and the weight."""
        values = self.encoding.decode(total)
        return values[:-1].astype(np.float32), float(values[-1])


@dataclass(frozen=True, slots=True)
class NoisedCountSum:
    """A sum of histograms in which every site has put its share of discrete noise."""

    mechanism: DistributedGaussian
    largest: int

    @property
    def granularity(self) -> float:
        """Of a count."""
        return self.mechanism.granularity

    def encode(self, vector: Vector, *, weight: float, bits: BitStream) -> NDArray[np.uint32]:
        """Of a site's exact counts, with its noise; see `SumCodec`."""
        most = self.largest * self.mechanism.clip_norm
        noisy = self.mechanism.privatise(
            np.clip(vector, -most, most), largest_batch=self.largest, bits=bits
        )
        return np.append(noisy, np.uint32(round(weight)))

    def decode(self, total: NDArray[np.uint32]) -> tuple[Vector, float]:
        """The sum, not the mean, and the weight."""
        fixed = self.mechanism.fixed_point(largest_batch=self.largest)
        return fixed.decode(total[:-1]).astype(np.float32), float(total[-1])


def monitor_codec(study: Study, *, sites: int) -> CountSum | NoisedCountSum:
    """The codec of the histograms, the same at every site and at the coordinator."""
    largest = study.aggregation.max_weight
    if study.privacy.mode == "distributed":
        return NoisedCountSum(monitor_mechanism(study, sites=sites), largest)
    std = local_monitor_noise(study) * monitor_sensitivity(study)
    bound = largest * monitor_records(study) + _HEADROOM * std
    length = size(monitor_layout(study)) + 1
    return CountSum(FixedPoint.choose(bound=bound, sites=sites, length=length))
