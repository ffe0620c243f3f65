"""What malicious sites send together: attacks on the update, by sites that know the honest ones.

They are the strongest that the literature has: the attackers act together and see the round's
honest updates before they answer.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fedward.core.simulated import Malicious
from fedward.strategies.strategy import Vector

_BISECTIONS = 40
_LARGEST = 64.0


def forge(attack: Malicious, own: Vector, honest: Sequence[Vector], *, attackers: int) -> Vector:
    """What an attacker sends, of "alie", "ipm" and "min-max".

    Args:
        attack: How.
        own: What the attacker's training gave.
        honest: The round's honest updates.
        attackers: How many sites attack together.

    Raises:
        ValueError: The attack is one that a site makes alone.
    """
    if not honest:
        return own
    stacked = np.stack(honest).astype(np.float64)
    mean, deviation = stacked.mean(0), stacked.std(0)
    forged: NDArray[np.float64]
    if attack.attack == "alie":
        forged = mean - _reach(len(honest) + attackers, attackers) * deviation
    elif attack.attack == "ipm":
        # Xie, Koyejo and Gupta 2019: the inner product with the mean turns negative.
        forged = -attack.scale * mean
    elif attack.attack == "min-max":
        forged = _min_max(stacked, mean, deviation)
    else:
        raise ValueError(f'"{attack.attack}" needs nobody else\'s update')
    return forged.astype(np.float32)


def _reach(sites: int, attackers: int) -> float:
    """How many deviations still look honest: Baruch, Baruch and Goldberg 2019, Algorithm 3."""
    needed = sites // 2 + 1 - attackers
    honest = sites - attackers
    share = min(max((honest - needed) / honest, 0.5), 1 - 1e-6)
    return NormalDist().inv_cdf(share)


def _min_max(
    honest: NDArray[np.float64], mean: NDArray[np.float64], deviation: NDArray[np.float64]
) -> NDArray[np.float64]:
    """As far along minus the deviation as two honest updates are apart.

    Shejwalkar and Houmansadr 2021, section 4.2, with their direction "inverse standard deviation".
    """
    lengths = (honest**2).sum(1)
    between = lengths[:, None] + lengths[None] - 2 * honest @ honest.T
    widest = max(float(between.max()), 0.0)
    length = math.sqrt(float((deviation**2).sum()))
    if length == 0 or widest == 0:
        return mean
    direction = -deviation / length
    low, high = 0.0, _LARGEST * math.sqrt(widest)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        farthest = float((((mean + middle * direction) - honest) ** 2).sum(1).max())
        low, high = (middle, high) if farthest <= widest else (low, middle)
    return mean + low * direction


def attack_success(
    triggered: Mapping[str, NDArray[np.float64]], clean: Mapping[str, NDArray[np.float64]]
) -> dict[str, float]:
    """How well a backdoor works, from a binary task's sums over sites.

    Returns:
        `success`: share of class-0 patients who are called class 1 once they carry the trigger;
        `without`: the same share without it. Empty for a task without a `histogram`.
    """
    if "histogram" not in triggered:
        return {}

    def called_one(sums: Mapping[str, NDArray[np.float64]]) -> float:
        negatives = np.asarray(sums["histogram"])[0]
        return float(negatives[len(negatives) // 2 :].sum() / max(1.0, negatives.sum()))

    return {"success": called_one(triggered), "without": called_one(clean)}
