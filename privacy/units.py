"""Units of privacy: what neighbours differ by, and what one unit's guarantee means for another.

- *record*: neighbours differ by one row. A patient with several rows is protected less.
- *patient*: neighbours differ by one patient with all rows. Fedward samples patients, sums the
  gradients of one patient's rows (at most `max_records` of them) and clips the sum as one vector,
  so that the patient is what the accountant calls an element.
- *site*: neighbours differ by all that a hospital holds: its update, or none. The update of a whole
  round is clipped as one vector. What a patient of the hospital has of that is
  `fedward.privacy.accounting.events.inside_a_site`.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.accounting.events import DpEvent, Leaf, event_of, inside_a_site, leaves
from fedward.privacy.accounting.pricing import (
    PLD_ABOVE_RDP,
    PrivacySpent,
    pld_of_zcdp,
    privacy_spent,
)

RECORDS_SHOWN = (2, 5, 10)
"""What stands next to an epsilon per record: a patient's with so many records."""

_GRID = 5e-3  # mixtures take seconds to tabulate; coarser is still an upper bound
_LARGEST_EPSILON = 100.0  # above it tables grow long, and two accountants are no better than one
_SMALLEST_DELTA = 1e-10  # see fedward.privacy.accounting.pricing
_TAIL = 14.0  # standard deviations of noise that the quadrature reaches beyond the means
_POINTS = 40_001
_STEPS_A_DEVIATION = 32  # of the quadrature: on smooth bells the error is below 1e-12
_REACH = 10.0  # standard deviations beyond the means: what lies further has mass below _CUT
_CUT = 1e-22
_ORDERS = (*(1 + x / 10 for x in range(1, 40)), *range(5, 65), 96, 128, 192, 256)


def patient_guarantees(
    event: DpEvent, *, delta: float, beside: DpEvent | None = None
) -> dict[int, PrivacySpent]:
    """`patient_guarantee` for each of `RECORDS_SHOWN`, by number of records."""
    return {
        records: patient_guarantee(event, records=records, delta=delta, beside=beside)
        for records in RECORDS_SHOWN
    }


def guarantees_to_json(guarantees: Mapping[int, PrivacySpent]) -> list[dict[str, Any]]:
    """As JSON values: each guarantee with the number of `records` that it is for."""
    return [{"records": records, **spent.to_json()} for records, spent in guarantees.items()]


def guarantees_line(guarantees: Sequence[Mapping[str, Any]]) -> str:
    """What an epsilon per record means for patients with several records, in one line.

    Args:
        guarantees: As `guarantees_to_json` makes them.
    """
    if not guarantees:
        return "what that means for a patient with several records is not known"
    figures = []
    for row in guarantees:
        epsilon = "no finite epsilon" if row["epsilon"] is None else f"epsilon {row['epsilon']:.2f}"
        accountant = "" if row["accountant"] == "pld" else f" by {row['accountant'].upper()}"
        figures.append(f"{epsilon}{accountant} with {row['records']} records")
    first = guarantees[0]
    return (
        f"per patient ({first['neighboring_relation']}, delta {first['delta']:g}, "
        f"{first['accountant'].upper()}): {', '.join(figures)}"
    )


def patient_of_a_site(event: DpEvent, *, delta: float) -> PrivacySpent:
    """What an event that protects whole sites costs a patient of one of them.

    Raises:
        ValueError: It samples sites, which this does not price.
    """
    return privacy_spent(event_of(inside_a_site(leaves(event))), delta=delta, unit="patient")


def patient_line(spent: Mapping[str, Any] | None) -> str:
    """What an epsilon per site means for one of the site's patients, in one line.

    Args:
        spent: As `PrivacySpent.to_json` makes it; None where a site did not say.
    """
    if spent is None:
        return "what that means for a patient of a site is not known"
    epsilon = "no finite epsilon" if spent["epsilon"] is None else f"epsilon {spent['epsilon']:.2f}"
    return (
        f"{epsilon} per patient (delta {spent['delta']:g}, {spent['neighboring_relation']}, "
        f"{spent['accountant'].upper()}): a patient more makes a site's update another one, and "
        "two differ by up to twice the clip norm"
    )


def worst_guarantees(tables: Iterable[Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The largest of several populations' guarantees, for each number of records.

    Args:
        tables: As `guarantees_to_json` makes them; an epsilon of None, no bound, is the largest.

    Returns:
        One such table; empty if there are no tables or one of them is empty.
    """
    by_records: list[dict[int, Mapping[str, Any]]] = [
        {row["records"]: row for row in table} for table in tables
    ]
    common = set.intersection(*map(set, by_records)) if by_records else set()
    found = []
    for records in sorted(common):
        worst: Mapping[str, Any] = max((table[records] for table in by_records), key=_as_number)
        found.append(dict(worst))
    return found


def _as_number(row: Mapping[str, Any]) -> float:
    return math.inf if row["epsilon"] is None else float(row["epsilon"])


def patient_guarantee(
    event: DpEvent, *, records: int, delta: float, beside: DpEvent | None = None
) -> PrivacySpent:
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
        beside: What else ran on the same patients, priced per patient.

    Raises:
        ValueError: An argument is outside its range, or the event has no price.
    """
    if records < 1:
        raise ValueError(f"records counts from 1, got {records}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    counted = [(leaf, records, count) for leaf, count in leaves(event).items()]
    if beside is not None:
        counted += [(leaf, 1, count) for leaf, count in leaves(beside).items()]
    return _price(tuple(sorted(counted)), delta)


# A ledger shows the same studies again and again, and simulated sites are often alike.
@functools.lru_cache(maxsize=1024)
def _price(counted: tuple[tuple[Leaf, int, int], ...], delta: float) -> PrivacySpent:
    """The joint price of mechanisms: each, how many records it meets, and how often it ran."""
    from dp_accounting.pld import privacy_loss_distribution
    from dp_accounting.rdp import compute_epsilon

    divergences = np.zeros(len(_ORDERS))
    for leaf, records, count in counted:
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
    for leaf, records, count in counted:
        of_leaf = _pld_of(leaf, records)
        pld = pld.compose(of_leaf if count == 1 else of_leaf.self_compose(count))
    epsilon = float(pld.get_epsilon_for_delta(delta))
    note = "" if epsilon <= rdp + _GRID else PLD_ABOVE_RDP
    return PrivacySpent(epsilon=epsilon, epsilon_rdp=rdp, delta=delta, unit="patient", note=note)


@functools.lru_cache(maxsize=64)
def _pld_of(leaf: Leaf, records: int) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    if leaf.kind == "poisson-gaussian":
        rate, noise = leaf.parameters
        return _mixture_pld(_binomial(records, rate), noise)
    if leaf.kind == "gaussian":
        return privacy_loss_distribution.from_gaussian_mechanism(
            leaf.parameters[0] / records, value_discretization_interval=_GRID
        )
    return pld_of_zcdp(leaf.parameters[0] * records**2, grid=_GRID)


def _mixture_pld(weights: NDArray[np.float64], noise: float) -> Any:
    """Of N(i, noise^2), i drawn with `weights`, against N(0, noise^2), in both directions.

    As dp-accounting's `from_mixture_gaussian_mechanism` ("connect the dots", Doroshenko et al.
    2022), which takes seconds: there the privacy loss is inverted by bisection, one number at a
    time. Here it is read off a table and polished by Newton's method. A hockey-stick divergence
    is greatest at the inverse, so an error there enters it squared.
    """
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution
    from scipy.special import log_ndtr

    means = np.arange(len(weights))
    logs = np.log(np.maximum(weights, 1e-300))

    def losses(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log of mixture over plain at x, which grows with x, and its slope."""
        each = logs[:, None] + (2 * means[:, None] * x - means[:, None] ** 2) / (2 * noise**2)
        total = np.logaddexp.reduce(each, axis=0)
        return total, (np.exp(each - total) * means[:, None]).sum(axis=0) / noise**2

    def tails(x: NDArray[np.float64], sign: int) -> tuple[NDArray[np.float64], ...]:
        """Log P(X > x), or of X < x where `sign` is -1: of the mixture, and of the plain one."""
        each = log_ndtr(-sign * (x - means[:, None]) / noise)
        return np.logaddexp.reduce(each + logs[:, None], axis=0), each[0]

    pmfs = []
    for sign, most in ((1, len(weights) - 1), (-1, 0)):
        x = np.linspace(-_REACH * noise, most + _REACH * noise, _POINTS)
        known, _ = losses(x)
        low, high = sorted((sign * known[0], sign * known[-1]))
        first, last = math.floor(low / _GRID), math.ceil(high / _GRID)
        epsilons = np.arange(first, last + 1) * _GRID
        at = np.interp(sign * epsilons, known, x)
        value, slope = losses(at)
        at = np.clip(at - (value - sign * epsilons) / np.maximum(slope, 1e-300), x[0], x[-1])
        mixture, plain = tails(at, sign)
        upper, lower = (mixture, plain) if sign > 0 else (plain, mixture)
        deltas = np.clip(np.exp(upper) - np.exp(epsilons + lower), 0.0, 1.0)
        deltas = np.maximum.accumulate(deltas[::-1])[::-1] + _CUT
        pmfs.append(
            pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(_GRID, first, last, deltas)
        )
    return privacy_loss_distribution.PrivacyLossDistribution(*pmfs)


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
    wanted = math.ceil((2 * reach + records) / noise * _STEPS_A_DEVIATION)
    x = np.linspace(-reach, records + reach, min(_POINTS, wanted))
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
