"""Accounting: DpEvents in, epsilon out."""

from fedward.privacy.accounting.calibration import (
    calibrate,
    calibrate_event,
    calibrate_gaussian,
)
from fedward.privacy.accounting.events import (
    DpEvent,
    adaptive_clipping_event,
    compose,
    discrete_gaussian_event,
    dp_sgd_event,
    event_from_json,
    event_to_json,
    gaussian_event,
    zcdp_event,
)
from fedward.privacy.accounting.pricing import PrivacySpent, Unit, privacy_spent

__all__ = [
    "DpEvent",
    "PrivacySpent",
    "Unit",
    "adaptive_clipping_event",
    "calibrate",
    "calibrate_event",
    "calibrate_gaussian",
    "compose",
    "discrete_gaussian_event",
    "dp_sgd_event",
    "event_from_json",
    "event_to_json",
    "gaussian_event",
    "privacy_spent",
    "zcdp_event",
]
