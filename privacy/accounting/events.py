"""Mechanisms as data: what was run, apart from what it costs.

Events are those of dp-accounting. The ones that Fedward runs, and therefore prices, are

- `GaussianDpEvent(noise_multiplier)`, one release of a sum with Gaussian noise;
- `PoissonSampledDpEvent(sample_rate, GaussianDpEvent)`, one step of DP-SGD;
- `ZCDpEvent(rho)`, a mechanism known by its concentrated-DP bound, such as (distributed)
  discrete Gaussian noise;
- `SelfComposedDpEvent` and `ComposedDpEvent` of these.

Everything else is refused where it is built, read or priced: an event that is not understood has
no price. dp-accounting takes a second to import, so it is imported where an event is made.
"""

import marshal
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

DpEvent: TypeAlias = Any
"""A `dp_accounting.DpEvent`; dp-accounting publishes no types."""

Kind = Literal["gaussian", "poisson-gaussian", "zcdp"]

_MAX_COUNT = 10**9
_MAX_DEPTH = 8
_MARSHAL = 2  # the last version in which equal values have equal bytes
_MOST_REMEMBERED = 4096
_written: "dict[bytes, Leaves]" = {}
_events: "dict[int, _Known]" = {}  # by the event's id
_shared: "dict[int, _Known]" = {}  # by the id of its JSON


class Leaf(NamedTuple):
    """One mechanism that ran once, in the form that is compared, counted and priced.

    Attributes:
        kind: Which mechanism.
        parameters: `(noise_multiplier,)`, `(sample_rate, noise_multiplier)` or `(rho,)`.
    """

    kind: Kind
    parameters: tuple[float, ...]


Leaves = Counter[Leaf]
"""Which mechanisms ran, and how often: all that the price of a composition depends on."""

_Known: TypeAlias = tuple[DpEvent, Leaves, dict[str, Any]]


def gaussian_event(noise_multiplier: float) -> DpEvent:
    """One release of a sum with Gaussian noise.

    Args:
        noise_multiplier: Standard deviation of the noise over the L2 sensitivity, > 0.

    Raises:
        ValueError: `noise_multiplier` is not positive and finite.
    """
    from dp_accounting import dp_event

    _positive("noise_multiplier", noise_multiplier)
    return dp_event.GaussianDpEvent(float(noise_multiplier))


# Sites ask for the same event in every round, and an event never changes.
@lru_cache(maxsize=4096, typed=True)
def dp_sgd_event(*, noise_multiplier: float, sample_rate: float, steps: int) -> DpEvent:
    """`steps` steps of DP-SGD: Poisson sampling, clipping, Gaussian noise.

    Charge what ran: the sample rate of the sampler, the steps taken, the noise added.

    Args:
        noise_multiplier: Standard deviation of the noise over the clip norm, > 0.
        sample_rate: Probability with which each unit takes part in a step, in (0, 1].
        steps: Number of steps taken, >= 0.

    Raises:
        ValueError: An argument is outside its range.
    """
    from dp_accounting import dp_event

    step = dp_event.GaussianDpEvent(_positive("noise_multiplier", noise_multiplier))
    if _rate(sample_rate) < 1:
        step = dp_event.PoissonSampledDpEvent(float(sample_rate), step)
    return dp_event.SelfComposedDpEvent(step, int(_count(steps)))


def adaptive_clipping_event(
    *, noise_multiplier: float, quantile_noise: float, sample_rate: float, steps: int
) -> DpEvent:
    """`steps` steps of DP-SGD whose clip norm follows a quantile of the gradients' norms.

    Each step also releases how many of its units were not clipped, with Gaussian noise (Andrew,
    Thakkar, McMahan and Ramaswamy 2021, section 3). A unit that takes part moves both releases at
    once, so together they are one Gaussian release whose inverse variances add up (their
    theorem 1), and that is what is charged. Two mechanisms that sample apart from each other would
    be billed too little: here a unit is in both or in neither.

    Args:
        noise_multiplier: Standard deviation of the gradients' noise over the clip norm, > 0.
        quantile_noise: Standard deviation of the noise on the number of units that were not
            clipped, each counted as 0 or 1, > 0.
        sample_rate: As in `dp_sgd_event`.
        steps: As in `dp_sgd_event`.

    Raises:
        ValueError: An argument is outside its range.
    """
    _positive("noise_multiplier", noise_multiplier)
    _positive("quantile_noise", quantile_noise)
    together = 1 / math.hypot(1 / noise_multiplier, 1 / quantile_noise)
    return dp_sgd_event(noise_multiplier=together, sample_rate=sample_rate, steps=steps)


def zcdp_event(rho: float) -> DpEvent:
    """A mechanism that satisfies `rho`-zero-concentrated DP (Bun and Steinke 2016).

    Raises:
        ValueError: `rho` is not positive and finite.
    """
    from dp_accounting import dp_event

    _positive("rho", rho)
    return dp_event.ZCDpEvent(rho=float(rho), xi=0.0)


def discrete_gaussian_event(noise_multiplier: float) -> DpEvent:
    """One release of a vector of integers with discrete Gaussian noise.

    In one dimension the privacy loss distribution of the discrete Gaussian is known, but not in
    many: its vector is not symmetric under rotation. It satisfies rho-zCDP with
    rho = 1 / (2 noise_multiplier^2) in every dimension (Canonne, Kamath and Steinke 2020,
    theorem 4), and that is what is charged.

    Args:
        noise_multiplier: The parameter sigma over the L2 sensitivity, both in grid units, > 0.

    Raises:
        ValueError: `noise_multiplier` is not positive and finite.
    """
    _positive("noise_multiplier", noise_multiplier)
    return zcdp_event(0.5 / noise_multiplier**2)


def compose(events: Iterable[DpEvent]) -> DpEvent:
    """All of `events` on the same data, adaptively chosen or not."""
    from dp_accounting import dp_event

    return dp_event.ComposedDpEvent(list(events))


def leaves(event: DpEvent) -> Leaves:
    """The canonical form of an event: which mechanisms it runs and how often each.

    Composition neither knows order nor grouping, so two events with the same leaves have the same
    price.

    Raises:
        ValueError: The event, or a part of it, is of a kind that Fedward does not price.
    """
    return shared_leaves(event).copy()


def shared_leaves(event: DpEvent) -> Leaves:
    """`leaves(event)`, remembered. Not to be changed: who asks again gets the same."""
    return _known(event)[1]


def shared_json(event: DpEvent) -> dict[str, Any]:
    """`event_to_json(event)`, remembered: a ledger writes the same event every round.

    Not to be changed: who asks again gets the same.
    """
    return _known(event)[2]


def _known(event: DpEvent) -> _Known:
    """What is remembered of an event, by object: to hash it takes longer than all else."""
    known = _events.get(id(event))
    if known is not None and known[0] is event:
        return known
    known = event, _found_leaves(event), event_to_json(event)
    try:
        hash(event)
    except TypeError:  # a composition holds a list, which may change
        return known
    if len(_events) >= _MOST_REMEMBERED:
        _events.clear()
        _shared.clear()
    _events[id(event)] = known
    _shared[id(known[2])] = known
    return known


def leaves_from_json(value: Any) -> Leaves:
    """`leaves(event_from_json(value))`, remembered: a ledger reads the same event every round.

    Not to be changed: who asks again gets the same.

    Raises:
        ValueError: As those.
    """
    known = _shared.get(id(value))
    if known is not None and known[2] is value:
        return known[1]
    try:
        key = marshal.dumps(value, _MARSHAL)
    except ValueError:  # not JSON, which is refused below
        return leaves(event_from_json(value))
    if key not in _written:
        if len(_written) >= _MOST_REMEMBERED:
            _written.clear()
        _written[key] = leaves(event_from_json(value))
    return _written[key]


def _found_leaves(event: DpEvent) -> Leaves:
    found: Leaves = Counter()
    _collect(event, 1, found, 0)
    return found


def inside_a_site(counted: Mapping[Leaf, int]) -> Leaves:
    """What mechanisms that protect whole sites cost a patient, or a record, of one of them.

    Taking a patient away changes a site's update to another one, within the same bound: the two
    are at most twice the bound apart, so to the patient it is the mechanism with half the noise
    multiplier. (Kairouz, Liu and Steinke's rounding keeps that: docs/distributed-noise.md, step 6.)

    Args:
        counted: Mechanisms of which adding or removing a whole site is the neighbouring relation.

    Raises:
        ValueError: A mechanism samples sites, which this does not price.
    """
    found: Leaves = Counter()
    for leaf, count in counted.items():
        match leaf.kind:
            case "gaussian":
                inside = Leaf("gaussian", (leaf.parameters[0] / 2,))
            case "zcdp":
                inside = Leaf("zcdp", (leaf.parameters[0] * 4,))
            case "poisson-gaussian":
                raise ValueError("a patient of a site that is sampled has no price here")
        found[inside] += count
    return found


def event_of(counted: Mapping[Leaf, int]) -> DpEvent:
    """The event that has the given leaves, in a fixed order."""
    from dp_accounting import dp_event

    events: list[DpEvent] = []
    for leaf, count in sorted(counted.items()):
        match leaf.kind:
            case "gaussian":
                event = gaussian_event(leaf.parameters[0])
            case "poisson-gaussian":
                event = dp_event.PoissonSampledDpEvent(
                    leaf.parameters[0], gaussian_event(leaf.parameters[1])
                )
            case "zcdp":
                event = zcdp_event(leaf.parameters[0])
        events.append(event if count == 1 else dp_event.SelfComposedDpEvent(event, count))
    return events[0] if len(events) == 1 else dp_event.ComposedDpEvent(events)


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """An event as a JSON value that `event_from_json` reads back to an equal event.

    Raises:
        ValueError: The event, or a part of it, is of a kind that Fedward does not price.
    """
    from dp_accounting import dp_event

    if isinstance(event, dp_event.GaussianDpEvent):
        _positive("noise_multiplier", event.noise_multiplier)
        return {"event": "gaussian", "noise_multiplier": float(event.noise_multiplier)}
    if isinstance(event, dp_event.PoissonSampledDpEvent):
        _rate(event.sampling_probability)
        return {
            "event": "poisson-sampled",
            "sample_rate": float(event.sampling_probability),
            "of": event_to_json(event.event),
        }
    if isinstance(event, dp_event.ZCDpEvent) and event.xi == 0:
        _positive("rho", event.rho)
        return {"event": "zcdp", "rho": float(event.rho)}
    if isinstance(event, dp_event.SelfComposedDpEvent):
        _count(event.count)
        return {
            "event": "repeated",
            "count": int(event.count),
            "of": event_to_json(event.event),
        }
    if isinstance(event, dp_event.ComposedDpEvent):
        return {"event": "composed", "of": [event_to_json(part) for part in event.events]}
    raise ValueError(f"no price is known for a {type(event).__name__}")


def event_from_json(value: Any) -> DpEvent:
    """Read an event.

    Raises:
        ValueError: The value is not an event that `event_to_json` writes: unknown kind, missing
            or unknown key, or a parameter outside its range.
    """
    return _read(value, 0)


def _read(value: Any, depth: int) -> DpEvent:
    from dp_accounting import dp_event

    if depth > _MAX_DEPTH:
        raise ValueError(f"an event is nested more than {_MAX_DEPTH} deep")
    kind = value.get("event") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _READERS:
        raise ValueError(f"unknown event {kind!r}; known: {', '.join(_READERS)}")
    keys, read = _READERS[kind]
    if set(value) != {"event", *keys}:
        raise ValueError(f"event {value['event']} has keys {sorted(value)}, expected {keys}")
    return read(dp_event, value, depth + 1)


def _read_poisson(module: Any, value: dict[str, Any], depth: int) -> DpEvent:
    event = module.PoissonSampledDpEvent(
        _rate(_number(value["sample_rate"])), _read(value["of"], depth)
    )
    _leaf(event)
    return event


def _read_composed(module: Any, value: dict[str, Any], depth: int) -> DpEvent:
    parts = value["of"] if isinstance(value["of"], list) else [None]
    return module.ComposedDpEvent([_read(part, depth) for part in parts])


def _read_repeated(module: Any, value: dict[str, Any], depth: int) -> DpEvent:
    return module.SelfComposedDpEvent(_read(value["of"], depth), _count(value["count"]))


_READERS: dict[str, tuple[tuple[str, ...], Callable[[Any, dict[str, Any], int], DpEvent]]] = {
    "gaussian": (
        ("noise_multiplier",),
        lambda _m, value, _d: gaussian_event(_number(value["noise_multiplier"])),
    ),
    "poisson-sampled": (("of", "sample_rate"), _read_poisson),
    "zcdp": (("rho",), lambda _m, value, _d: zcdp_event(_number(value["rho"]))),
    "repeated": (("count", "of"), _read_repeated),
    "composed": (("of",), _read_composed),
}


def _collect(event: DpEvent, count: int, found: Leaves, depth: int) -> None:
    from dp_accounting import dp_event

    if depth > _MAX_DEPTH:
        raise ValueError(f"an event is nested more than {_MAX_DEPTH} deep")
    if isinstance(event, dp_event.SelfComposedDpEvent):
        if _count(event.count) > 0:
            _collect(event.event, _count(event.count * count), found, depth + 1)
        return
    if isinstance(event, dp_event.ComposedDpEvent):
        for part in event.events:
            _collect(part, count, found, depth + 1)
        return
    found[_leaf(event)] += count


def _leaf(event: DpEvent) -> Leaf:
    from dp_accounting import dp_event

    if isinstance(event, dp_event.GaussianDpEvent):
        return Leaf("gaussian", (_positive("noise_multiplier", event.noise_multiplier),))
    if isinstance(event, dp_event.ZCDpEvent) and event.xi == 0:
        return Leaf("zcdp", (_positive("rho", event.rho),))
    if isinstance(event, dp_event.PoissonSampledDpEvent):
        rate = _rate(event.sampling_probability)
        inner = event.event
        if isinstance(inner, dp_event.SelfComposedDpEvent) and inner.count == 1:
            inner = inner.event
        if isinstance(inner, dp_event.GaussianDpEvent):
            noise = _positive("noise_multiplier", inner.noise_multiplier)
            # Sampling everybody is no sampling.
            if rate == 1:
                return Leaf("gaussian", (noise,))
            return Leaf("poisson-gaussian", (rate, noise))
    raise ValueError(f"no price is known for {event!r}")


def _number(value: Any) -> float:
    if type(value) in (int, float):
        return float(value)
    raise ValueError(f"expected a number, found {type(value).__name__}")


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def _rate(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"sample_rate must be in (0, 1], got {value}")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_COUNT:
        raise ValueError(f"a count is a whole number from 0 to {_MAX_COUNT}, got {value!r}")
    return value
