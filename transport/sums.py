"""Updates as what is summed under secure aggregation: one vector, the weight inside it."""

import numpy as np
from numpy.typing import NDArray

from fedward.core.study import Study
from fedward.privacy.mechanisms.encoding import FixedPoint
from fedward.strategies.strategy import Vector


def sum_encoding(study: Study, *, sites: int, size: int) -> FixedPoint:
    """How the vectors of a study become integers, the same at every site and the coordinator.

    Args:
        study: Its `[aggregation]` bounds an update and a weight.
        sites: Largest number of sites in a sum.
        size: Number of parameters.
    """
    del study
    return FixedPoint.choose(bound=1.0, sites=sites, length=size + 1)


def to_summand(study: Study, update: Vector, weight: float) -> NDArray[np.float64]:
    """What a site adds to the sum: its weighted update, and its weight, each in [-1, 1].

    Coordinates beyond `max_update` and weights beyond `max_weight` are cut; what is not finite
    counts as zero, for one such number would spoil the sum for everybody.
    """
    bounds = study.aggregation
    share = min(weight, bounds.max_weight) / bounds.max_weight
    values = np.nan_to_num(update.astype(np.float64), posinf=0.0, neginf=0.0)
    values = np.clip(values, -bounds.max_update, bounds.max_update) / bounds.max_update
    return np.append(values * share, share)


def from_sum(study: Study, total: NDArray[np.float64]) -> tuple[Vector, float]:
    """The weighted mean update and the weight of all sites in a sum.

    Raises:
        ValueError: The sum holds no weight.
    """
    bounds = study.aggregation
    share = float(total[-1])
    if share <= 0:
        raise ValueError("the sum holds no weight")
    mean = total[:-1] / share * bounds.max_update
    return mean.astype(np.float32), share * bounds.max_weight
