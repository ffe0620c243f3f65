"""What events cost: privacy loss distributions, with Rényi DP as the second opinion.

Both accountants give upper bounds on epsilon. The default is the privacy loss distribution (PLD;
Koskela et al. 2020, Doroshenko et al. 2022) on a grid of 1e-3, for neighbours that differ by
adding or removing one unit; Rényi DP (RDP; Mironov 2017, Mironov, Talwar and Zhang 2019) stands
beside it. The central-limit approximation "GDP" is not a bound and is not offered.
"""

import functools
import logging
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from fedward.privacy.accounting.events import DpEvent, Leaf, Leaves, event_of, leaves

Unit = Literal["record", "patient", "site"]
Accountant = Literal["pld", "rdp"]
Content = tuple[tuple[Leaf, int], ...]

GRID = 1e-3
"""Distance between the privacy losses that a PLD is rounded up to."""

PLD_ABOVE_RDP = "PLD is above RDP: the grid is too coarse, or a bug"
"""The note of a guarantee that it is so of."""

_LARGEST_EPSILON = 500.0
_SMALLEST_NOISE = 0.1
# Convolutions by FFT are right to some 1e-15 of mass each; after 10,000 steps they were seen to
# say too little at 1e-12 (4.682 for 4.704) and at 1e-13 (4.867 for 4.896), at 1e-11 not.
_SMALLEST_DELTA = 1e-10
_ROUNDING = 1e-6
_REMEMBERED = 16
_QUICK_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySpent:
    """A guarantee, with everything that it means nothing without.

    Attributes:
        epsilon: Upper bound by `accountant` at `delta`.
        epsilon_rdp: Upper bound by RDP at `delta`.
        delta: The probability with which the bound may fail.
        unit: What neighbours differ by.
        neighboring_relation: How they differ.
        accountant: "pld", or "rdp" where the loss is too large for a PLD.
        note: What a reader of the two figures has to know, or "".
    """

    epsilon: float
    epsilon_rdp: float
    delta: float
    unit: Unit
    neighboring_relation: Literal["add-or-remove-one"] = "add-or-remove-one"
    accountant: Accountant = "pld"
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON value; an infinite epsilon is null, for there is no guarantee."""
        value = asdict(self)
        for key in ("epsilon", "epsilon_rdp"):
            if not math.isfinite(value[key]):
                value[key] = None
        if not self.note:
            del value["note"]
        return value

    def __str__(self) -> str:
        """One line for people."""
        text = (
            f"epsilon {self.epsilon:.2f} (delta {self.delta:g}, per {self.unit}, "
            f"{self.neighboring_relation}, {self.accountant.upper()}; RDP {self.epsilon_rdp:.2f})"
        )
        return f"{text}; {self.note}" if self.note else text


def privacy_spent(event: DpEvent, *, delta: float, unit: Unit) -> PrivacySpent:
    """Price an event: the joint loss of everything in it, never a sum of epsilons.

    Args:
        event: What ran.
        delta: In (0, 1).
        unit: What one element of the sampler, and one clipped vector, was.

    Raises:
        ValueError: `delta` is outside its range, or the event is of a kind without a price.
    """
    return price(leaves(event), delta=delta, unit=unit)


def price(counted: Mapping[Leaf, int], *, delta: float, unit: Unit) -> PrivacySpent:
    """Price a composition given by its leaves. Raises as `privacy_spent`."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if unit not in ("record", "patient", "site"):
        raise ValueError(f"unit must be record, patient or site, got {unit!r}")
    rdp = rdp_epsilon(counted, delta=delta)
    pld = pld_epsilon(counted, delta=delta)
    if pld is None:
        reason = "delta is too small" if delta < _SMALLEST_DELTA else "the loss is too large"
        note = f"{reason} for a privacy loss distribution, so RDP is shown twice"
        return PrivacySpent(
            epsilon=rdp, epsilon_rdp=rdp, delta=delta, unit=unit, accountant="rdp", note=note
        )
    note = "" if pld <= rdp + _ROUNDING else PLD_ABOVE_RDP
    return PrivacySpent(epsilon=pld, epsilon_rdp=rdp, delta=delta, unit=unit, note=note)


def best_epsilon(counted: Mapping[Leaf, int], *, delta: float) -> float:
    """The epsilon that `price` reports, without the second opinion where it is not needed."""
    pld = pld_epsilon(counted, delta=delta)
    return rdp_epsilon(counted, delta=delta) if pld is None else pld


def pld_epsilon(counted: Mapping[Leaf, int], *, delta: float) -> float | None:
    """Epsilon by loss distributions, or None where they do not serve.

    Over 500, or with noise under 0.1, the grid would be long, and nobody would permit the run;
    under a delta of 1e-10 the arithmetic is not exact enough.
    """
    return _pld_epsilon(_content(counted), delta)


def _content(counted: Mapping[Leaf, int]) -> Content:
    """A composition as a key. In a fixed order, so that sums over it round alike everywhere."""
    return tuple(sorted((leaf, n) for leaf, n in counted.items() if n > 0))


# Thousands of simulated sites ask for the price of the same composition, which never changes.
@functools.lru_cache(maxsize=4096)
def _pld_epsilon(content: Content, delta: float) -> float | None:
    if delta < _SMALLEST_DELTA:
        return None
    present: Leaves = Counter(dict(content))
    noise = [leaf.parameters[-1] for leaf in present if leaf.kind != "zcdp"]
    if any(value < _SMALLEST_NOISE for value in noise):
        return None
    if rdp_epsilon(present, delta=1e-3, orders=_QUICK_ORDERS) > _LARGEST_EPSILON:
        return None
    return float(_composed(present).get_epsilon_for_delta(delta))


def rdp_epsilon(
    counted: Mapping[Leaf, int], *, delta: float, orders: tuple[float, ...] | None = None
) -> float:
    """Epsilon by Rényi DP: divergences add up, order by order; dp-accounting's orders."""
    return _rdp_epsilon(_content(counted), delta, orders)


@functools.lru_cache(maxsize=4096)
def _rdp_epsilon(content: Content, delta: float, orders: tuple[float, ...] | None) -> float:
    from dp_accounting.rdp import compute_epsilon
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

    chosen = tuple(DEFAULT_RDP_ORDERS) if orders is None else orders
    total = np.zeros(len(chosen))
    for leaf, count in content:
        total += count * _renyi(leaf, chosen)
    return float(compute_epsilon(np.array(chosen), total, delta)[0])


_cache: OrderedDict[frozenset[tuple[Leaf, int]], Any] = OrderedDict()
_lock = threading.RLock()


def _composed(counted: Leaves) -> Any:
    """The loss distribution of all of `counted`, from the nearest composition known.

    Why the cache is right. The key is the whole content of what was composed: every mechanism's
    kind, parameters and count, so two keys are equal only if the compositions are. A composition
    is a convolution of loss distributions, which knows no order, so that of a larger content is
    the known one of a part of it, convolved with the rest. Each convolution moves at most 1e-15
    of mass, and only towards larger losses, so whatever path was taken the result is an upper
    bound, and two paths differ by rounding alone (a test compares them). Nothing that depends on
    data, time, delta or a ledger enters.
    """
    key = frozenset(counted.items())
    with _lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
        pld, rest = _nearest(counted)
        for leaf, count in sorted(_merged(rest).items()):
            pld = pld.compose(pld_of(leaf, count))
        _cache[key] = pld
        if len(_cache) > _REMEMBERED:
            _cache.popitem(last=False)
        return pld


def clear_cache() -> None:
    """Forget every composition; prices do not change by it."""
    with _lock:
        _cache.clear()
        pld_of.cache_clear()
        _pld_epsilon.cache_clear()
        _rdp_epsilon.cache_clear()


def _nearest(counted: Leaves) -> tuple[Any, Leaves]:
    """The known part of `counted` that leaves the fewest kinds of mechanism to compose.

    Gaussian and zCDP mechanisms combine exactly among themselves, which those composed earlier
    no longer can: so a part is used only if it does not split them.
    """
    best, rest = _identity(), counted
    for items, pld in _cache.items():
        part = dict(items)
        if any(counted[leaf] < n for leaf, n in part.items()):
            continue
        left = +Counter({leaf: n - part.get(leaf, 0) for leaf, n in counted.items()})
        kinds = {leaf.kind for leaf in part} - {"poisson-gaussian"}
        if not any(leaf.kind in kinds for leaf in left) and len(left) < len(rest):
            best, rest = pld, left
    return best, rest


def _merged(rest: Leaves) -> Leaves:
    """Combine what combines exactly: Gaussians by sum of 1/sigma^2, zCDP by sum of rho."""
    merged: Leaves = Counter()
    precision = math.fsum(
        n / leaf.parameters[0] ** 2 for leaf, n in rest.items() if leaf.kind == "gaussian"
    )
    rho = math.fsum(n * leaf.parameters[0] for leaf, n in rest.items() if leaf.kind == "zcdp")
    if precision > 0:
        merged[Leaf("gaussian", (1 / math.sqrt(precision),))] = 1
    if rho > 0:
        merged[Leaf("zcdp", (rho,))] = 1
    for leaf, count in rest.items():
        if leaf.kind == "poisson-gaussian":
            merged[leaf] = count
    return merged


@functools.lru_cache(maxsize=64)
def pld_of(leaf: Leaf, count: int) -> Any:
    """The loss distribution of `count` runs of one mechanism."""
    from dp_accounting.pld import privacy_loss_distribution

    if count > 1:
        return pld_of(leaf, 1).self_compose(count)
    if leaf.kind == "zcdp":
        return pld_of_zcdp(leaf.parameters[0], grid=GRID)
    rate = leaf.parameters[0] if leaf.kind == "poisson-gaussian" else 1.0
    return privacy_loss_distribution.from_gaussian_mechanism(
        leaf.parameters[-1], value_discretization_interval=GRID, sampling_prob=rate
    )


def pld_of_zcdp(rho: float, *, grid: float) -> Any:
    """A loss distribution that dominates every rho-zCDP mechanism.

    rho-zCDP gives delta(epsilon) <= min over alpha of
    exp((alpha-1)(alpha rho - epsilon)) (1-1/alpha)^alpha / (alpha-1) (Canonne, Kamath and Steinke
    2020, proposition 12). As a function of exp(epsilon) the true delta is convex, so it also lies
    under the largest convex function below that minimum; connecting its dots (Doroshenko et al.
    2022, algorithm 1) then gives a dominating distribution. The dots start at epsilon 0, where
    delta is at most 1, and mirror losses below 0 by putting their mass at 0, which only adds.
    """
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution

    top = rho + 2 * math.sqrt(rho * 45.0) + grid  # delta there is below exp(-45)
    steps = math.ceil(top / grid)
    epsilons = np.arange(steps + 1) * grid
    orders = 1 + np.geomspace(1e-3, 1e4, 2000)
    logs = np.full(epsilons.size, 0.0)
    for alpha in orders:
        constant = alpha * math.log1p(-1 / alpha) - math.log(alpha - 1)
        np.minimum(logs, (alpha - 1) * (alpha * rho - epsilons) + constant, out=logs)
    curve = _convex_minorant(np.exp(epsilons), np.exp(logs))
    pmf = pld_pmf.create_pmf_pessimistic_connect_dots(
        discretization=grid,
        rounded_epsilons=np.arange(steps + 1),
        deltas=np.minimum.accumulate(np.clip(curve, 0.0, 1.0)),
    )
    return privacy_loss_distribution.PrivacyLossDistribution(pmf)


def _convex_minorant(x: Any, y: Any) -> Any:
    """The largest convex function below the points, at the same x (Andrew's lower hull)."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return np.interp(x, x[hull], y[hull])


def _identity() -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.identity(value_discretization_interval=GRID)


@functools.lru_cache(maxsize=4096)
def _renyi(leaf: Leaf, orders: tuple[float, ...]) -> Any:
    """The Rényi divergences of one run of a mechanism, shape `(len(orders),)`."""
    from dp_accounting.rdp import RdpAccountant

    class Divergences(RdpAccountant):  # type: ignore[misc] # dp-accounting publishes no types
        def get(self) -> Any:
            return self._rdp

    log = logging.getLogger("absl")
    # An order that does not converge counts as infinite, which keeps the bound a bound.
    log.addFilter(_without_unconverged_orders)
    try:
        return Divergences(orders).compose(event_of({leaf: 1})).get()
    finally:
        log.removeFilter(_without_unconverged_orders)


def _without_unconverged_orders(record: logging.LogRecord) -> bool:
    return "failed to converge" not in record.getMessage()
