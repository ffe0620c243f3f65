"""Units of privacy: what neighbours differ by, and what one unit's guarantee means for another.

- *record*: neighbours differ by one row. A patient with several rows is protected less.
- *patient*: neighbours differ by one patient with all rows. Fedward samples patients, sums the
  gradients of one patient's rows (at most `max_records` of them) and clips the sum as one vector,
  so that the patient is what the accountant calls an element.
- *site*: neighbours differ by a whole hospital.
"""

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.accounting.events import DpEvent, Leaf, leaves
from fedward.privacy.accounting.pricing import PrivacySpent, pld_of_zcdp

_GRID = 5e-3  # mixtures take seconds to tabulate; coarser is still an upper bound
_LARGEST_EPSILON = 100.0  # above it tables grow long, and two accountants are no better than one
_SMALLEST_DELTA = 1e-10  # see fedward.privacy.accounting.pricing
_TAIL = 14.0  # standard deviations of noise that the quadrature reaches beyond the means
_POINTS = 40_001
_ORDERS = (*(1 + x / 10 for x in range(1, 40)), *range(5, 65), 96, 128, 192, 256)


def patient_guarantee(event: DpEvent, *, records: int, delta: float) -> PrivacySpent:
    """What record-level training means for a patient with `records` records.

    A step takes each of the patient's records with the sample rate, independently, and each that
    is taken moves the sum by up to the clip norm; so their number is binomial, and the step is
    dominated by a mixture of Gaussians with that many clip norms as means (Ganesh 2024, "Tight
    group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians mechanisms",
    theorem 3.1). That is priced by PLD, and by RDP, whose integral is taken numerically. Without
    sampling, or for zCDP, `records` records are one of `records` times the sensitivity.

    Multiplying epsilon by `records` would be wrong, for delta grows too.

    Args:
        event: What ran, priced per record.
        records: The most records that one patient has, >= 1.
        delta: In (0, 1), for the patient.

    Raises:
        ValueError: An argument is outside its range, or the event has no price.
    """
    from dp_accounting.pld import privacy_loss_distribution
    from dp_accounting.rdp import compute_epsilon

    if records < 1:
        raise ValueError(f"records counts from 1, got {records}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    counted = sorted(leaves(event).items())
    divergences = np.zeros(len(_ORDERS))
    for leaf, count in counted:
        divergences += count * _renyi(leaf, records)
    rdp = float(compute_epsilon(np.array(_ORDERS), divergences, delta)[0])
    if rdp > _LARGEST_EPSILON or delta < _SMALLEST_DELTA:
        return PrivacySpent(
            epsilon=rdp,
            epsilon_rdp=rdp,
            delta=delta,
            unit="patient",
            accountant="rdp",
            note="out of reach of a privacy loss distribution, so RDP is shown twice",
        )
    pld = privacy_loss_distribution.identity(value_discretization_interval=_GRID)
    for leaf, count in counted:
        of_leaf = _pld_of(leaf, records)
        pld = pld.compose(of_leaf if count == 1 else of_leaf.self_compose(count))
    epsilon = float(pld.get_epsilon_for_delta(delta))
    note = "" if epsilon <= rdp + _GRID else "PLD is above RDP: the grid is too coarse, or a bug"
    return PrivacySpent(epsilon=epsilon, epsilon_rdp=rdp, delta=delta, unit="patient", note=note)


@functools.lru_cache(maxsize=64)
def _pld_of(leaf: Leaf, records: int) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    if leaf.kind == "poisson-gaussian":
        rate, noise = leaf.parameters
        return privacy_loss_distribution.from_mixture_gaussian_mechanism(
            noise,
            [float(number) for number in range(records + 1)],
            [float(p) for p in _binomial(records, rate)],
            value_discretization_interval=_GRID,
        )
    if leaf.kind == "gaussian":
        return privacy_loss_distribution.from_gaussian_mechanism(
            leaf.parameters[0] / records, value_discretization_interval=_GRID
        )
    return pld_of_zcdp(leaf.parameters[0] * records**2, grid=_GRID)


@functools.lru_cache(maxsize=64)
def _renyi(leaf: Leaf, records: int) -> NDArray[np.float64]:
    """The Rényi divergences of one run, the larger of both directions, shape `(orders,)`."""
    orders = np.array(_ORDERS)
    if leaf.kind == "gaussian":
        return orders * records**2 / (2 * leaf.parameters[0] ** 2)
    if leaf.kind == "zcdp":
        return orders * records**2 * leaf.parameters[0]
    rate, noise = leaf.parameters
    # log of N(i, noise^2) at x, for i = 0 ... records.
    reach = _TAIL * noise + 4.0 * records * max(1.0, 1.0 / noise)
    x = np.linspace(-reach, records + reach, _POINTS)
    logs = -((x - np.arange(records + 1)[:, None]) ** 2) / (2 * noise**2)
    weights = np.log(np.maximum(_binomial(records, rate), 1e-300))
    mixture = np.logaddexp.reduce(logs + weights[:, None], axis=0)
    plain = logs[0]
    constant = math.log((x[1] - x[0]) / (noise * math.sqrt(2 * math.pi)))
    worst = np.full(orders.size, np.inf)
    for index, order in enumerate(orders):
        both = [order * p + (1 - order) * q for p, q in ((mixture, plain), (plain, mixture))]
        # Where the integrand still grows at the edge, the integral would be cut short.
        if max(max(log[0], log[-1]) - log.max() for log in both) < -_TAIL:
            worst[index] = max((np.logaddexp.reduce(log) + constant) / (order - 1) for log in both)
    floored: NDArray[np.float64] = np.maximum(worst, 0.0)
    return floored


def _binomial(count: int, rate: float) -> NDArray[np.float64]:
    return np.array(
        [
            math.comb(count, number) * rate**number * (1 - rate) ** (count - number)
            for number in range(count + 1)
        ]
    )
