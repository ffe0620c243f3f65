"""Finding a site that sends nonsense, without seeing any site's vector: sums of groups.

An audit round takes the place of an ordinary one. It runs secure aggregation in each group by
itself, with terms of its own; every site checks `min_sites` as ever. The groups of a round are
disjoint, and an update is in one round only: sums of overlapping groups would differ by few sites.
"""

import math
import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.secagg.terms import MIN_SITES


def groups(sites: Sequence[str], *, min_sites: int) -> list[tuple[str, ...]]:
    """A random partition into as many groups of `min_sites` or more as there can be.

    Drawn anew for each audit round, so that a few rounds tell the sites of a group apart.

    Raises:
        ValueError: There are too few sites for two groups, or groups would be too small.
    """
    if min_sites < MIN_SITES:
        raise ValueError(f"a group needs {MIN_SITES} sites or more")
    count = len(sites) // min_sites
    if count < 2:  # noqa: PLR2004 (one group is no audit)
        raise ValueError(
            f"{len(sites)} sites make no two groups of {min_sites}; ask the sites one by one"
        )
    order = list(sites)
    secrets.SystemRandom().shuffle(order)
    return [tuple(sorted(order[start::count])) for start in range(count)]


def suspects(
    sums: Mapping[tuple[str, ...], NDArray[np.float64]],
    *,
    clip_norm: float,
    noise_std: float = 0.0,
    granularity: float = 0.0,
    false_alarm_bits: float = 40,
) -> list[tuple[str, ...]]:
    """The groups whose sum is longer than honest vectors and their noise can make it.

    Args:
        sums: For each group the decoded sum of its vectors, shape `(length,)`.
        clip_norm: The L2 norm to which every site clips.
        noise_std: Standard deviation of one site's noise in a coordinate.
        granularity: The value of a granule, for what rounding adds.
        false_alarm_bits: An honest group is named with probability below 2^-this.

    Returns:
        Groups that hold at least one liar.
    """
    found = []
    for members, total in sums.items():
        # A Gaussian vector's norm exceeds std (sqrt(d) + sqrt(2 x)) with probability below e^-x.
        tail = math.sqrt(2 * false_alarm_bits * math.log(2))
        noise = noise_std * math.sqrt(len(members)) * (math.sqrt(total.size) + tail)
        rounding = len(members) * granularity * math.sqrt(total.size)
        if not np.linalg.norm(total) <= len(members) * clip_norm + noise + rounding:
            found.append(members)
    return found
