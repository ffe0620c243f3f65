from __future__ import annotations

import json
import math
from typing import Any

import dp_accounting
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.privacy.accounting import (
    DpEvent,
    compose,
    dp_sgd_event,
    event_from_json,
    event_to_json,
    gaussian_event,
    privacy_spent,
    zcdp_event,
)
from fedward.privacy.accounting.events import event_of, leaves

DELTA = 1e-5

nested = st.recursive(
    st.one_of(
        st.builds(gaussian_event, st.floats(1e-3, 1e3)),
        st.builds(zcdp_event, st.floats(1e-6, 1e3)),
        st.builds(
            lambda noise, rate, steps: dp_sgd_event(
                noise_multiplier=noise, sample_rate=rate, steps=steps
            ),
            st.floats(1e-3, 1e3),
            st.floats(1e-6, 1.0),
            st.integers(0, 10_000),
        ),
    ),
    lambda inner: st.builds(compose, st.lists(inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(event=nested)
def test_an_event_survives_json(event: DpEvent) -> None:
    text = json.dumps(event_to_json(event), allow_nan=False)

    again = event_from_json(json.loads(text))

    assert again == event
    assert leaves(again) == leaves(event)


@settings(max_examples=200, deadline=None)
@given(event=nested)
def test_leaves_and_events_are_two_forms_of_one_thing(event: DpEvent) -> None:
    assert leaves(event_of(leaves(event))) == leaves(event)


GOOD = {"event": "gaussian", "noise_multiplier": 1.0}
BAD: list[Any] = [
    None,
    3,
    [],
    "gaussian",
    {},
    {"event": ["gaussian"]},
    {"event": "laplace", "noise_multiplier": 1.0},
    {"event": "gaussian"},
    {"event": "gaussian", "noise_multiplier": 1.0, "extra": 1},
    {"event": "gaussian", "noise_multiplier": 0.0},
    {"event": "gaussian", "noise_multiplier": -1.0},
    {"event": "gaussian", "noise_multiplier": float("nan")},
    {"event": "gaussian", "noise_multiplier": float("inf")},
    {"event": "gaussian", "noise_multiplier": "1"},
    {"event": "gaussian", "noise_multiplier": True},
    {"event": "zcdp", "rho": 0},
    {"event": "repeated", "count": -1, "of": GOOD},
    {"event": "repeated", "count": 1.5, "of": GOOD},
    {"event": "repeated", "count": True, "of": GOOD},
    {"event": "repeated", "count": 10**12, "of": GOOD},
    {"event": "composed", "of": GOOD},
    {"event": "composed", "of": [GOOD, None]},
    {"event": "poisson-sampled", "sample_rate": 0.0, "of": GOOD},
    {"event": "poisson-sampled", "sample_rate": 1.1, "of": GOOD},
    {"event": "poisson-sampled", "sample_rate": 0.1, "of": {"event": "zcdp", "rho": 1.0}},
    {"event": "poisson-sampled", "sample_rate": 0.1, "of": {"event": "composed", "of": [GOOD]}},
]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_what_is_not_an_event_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        event_from_json(value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["event", "of", "count", "rho", "sample_rate", "noise_multiplier", "x"]
            ),
            inner
            | st.sampled_from(["gaussian", "zcdp", "repeated", "composed", "poisson-sampled"]),
            max_size=4,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(value=anything)
def test_whatever_is_read_is_an_event_or_a_value_error(value: object) -> None:
    try:
        event = event_from_json(value)
    except ValueError:
        return
    assert event_to_json(event) == value


def test_a_deep_event_is_refused_instead_of_exhausting_the_stack() -> None:
    value: Any = GOOD
    for _ in range(50):
        value = {"event": "composed", "of": [value]}

    with pytest.raises(ValueError, match="nested"):
        event_from_json(value)


@pytest.mark.parametrize(
    "event",
    [
        dp_accounting.NonPrivateDpEvent(),
        dp_accounting.NoOpDpEvent(),
        dp_accounting.UnsupportedDpEvent(),
        dp_accounting.LaplaceDpEvent(1.0),
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.LaplaceDpEvent(1.0)),
        dp_accounting.SampledWithoutReplacementDpEvent(100, 10, dp_accounting.GaussianDpEvent(1.0)),
        dp_accounting.GaussianDpEvent(0.0),
        dp_accounting.ZCDpEvent(0.1, 0.1),
        "an event",
    ],
    ids=repr,
)
def test_an_event_that_is_not_understood_has_no_price(event: DpEvent) -> None:
    for wrapped in (event, compose([gaussian_event(1.0), event])):
        with pytest.raises(ValueError, match=r"."):
            privacy_spent(wrapped, delta=DELTA, unit="patient")
        with pytest.raises(ValueError, match=r"."):
            event_to_json(wrapped)


def test_events_with_senseless_parameters_cannot_be_made() -> None:
    for noise in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_multiplier"):
            dp_sgd_event(noise_multiplier=noise, sample_rate=0.1, steps=1)
    for rate in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sample_rate"):
            dp_sgd_event(noise_multiplier=1.0, sample_rate=rate, steps=1)
    with pytest.raises(ValueError, match="count"):
        dp_sgd_event(noise_multiplier=1.0, sample_rate=0.1, steps=-1)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            privacy_spent(gaussian_event(1.0), delta=delta, unit="patient")
