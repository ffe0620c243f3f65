"""CDS Hooks: discovery, the patient-view service, feedback."""

import copy
import datetime
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from release_samples import SIGNATURE, publish_sample, sigmoid_of
from serving_client import ask

from fedward.core.fields import ModelSignature
from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving.app import App
from fedward.serving.audit import AuditLog
from fedward.serving.catalogue import Catalogue
from fedward.serving.cds import parse_hook
from fedward.serving.engine import start_engine
from fedward.serving.problems import Problem
from fedward.serving.service import Service

_FIELDS = tuple(
    # The sample's age and sex, with the codes by which a record knows them.
    type(field)(
        **{
            **{name: getattr(field, name) for name in field.__slots__},
            "loinc": {"age": "30525-0", "sex": "46098-0"}.get(field.name, field.loinc),
        }
    )
    for field in SIGNATURE.fields
)
_SIGNATURE = ModelSignature(
    model="tiny", version=1, task="tiny", outcome=SIGNATURE.outcome, fields=_FIELDS
)
_BORN = datetime.datetime.now(tz=datetime.UTC).year - 64
# After the specification's own example request for patient-view.
_HOOK: dict[str, Any] = {
    "hookInstance": "d1577c69-dfbe-44ad-ba6d-3e05e953b2ea",
    "fhirServer": "http://hooks.smarthealthit.org:9080",
    "hook": "patient-view",
    "fhirAuthorization": {
        "access_token": "some-opaque-fhir-access-token",
        "token_type": "Bearer",
        "expires_in": 300,
        "scope": "user/Patient.read user/Observation.read",
        "subject": "cds-service4",
    },
    "context": {"userId": "Practitioner/example", "patientId": "1288992"},
    "prefetch": {
        "patient": {
            "resourceType": "Patient",
            "gender": "male",
            "birthDate": f"{_BORN}-01-01",
            "id": "1288992",
            "active": True,
        },
        "observations": {
            "resourceType": "Bundle",
            "type": "searchset",
            "entry": [
                {
                    "resource": {
                        "resourceType": "Observation",
                        "status": "final",
                        "code": {"coding": [{"system": "http://loinc.org", "code": "2093-3"}]},
                        "effectiveDateTime": when,
                        "valueQuantity": {"value": value, "unit": unit},
                    }
                }
                for when, value, unit in (
                    ("2026-03-01", 6.0, "mmol/L"),
                    ("2025-01-01", 111.0, "mg/dL"),
                    ("2026-09-09", 5.0, "furlong"),
                )
            ],
        },
    },
}


def _changed(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(_HOOK), **parts}


@pytest.fixture
def app(tmp_path: Path) -> App:
    identity = Identity.generate_publisher()
    folder = publish_sample(tmp_path / "registry", identity)
    engine = start_engine(read_release(folder, identity.public))
    return App(Service(Catalogue([engine]), audit=AuditLog(tmp_path / "audit.jsonl")))


def test_a_record_becomes_the_models_input_with_the_latest_known_value() -> None:
    inputs = parse_hook(_HOOK, _SIGNATURE)

    np.testing.assert_allclose(inputs, [[64, 1, 6.0 * 38.665, np.nan]], rtol=1e-6)


def test_discovery_lists_a_valid_service(app: App) -> None:
    services = ask(app, "GET", "/cds-services").json["services"]

    assert [(s["hook"], s["id"]) for s in services] == [("patient-view", "tiny")]
    assert services[0]["prefetch"]["patient"] == "Patient/{{context.patientId}}"
    assert "http://loinc.org|2093-3" in services[0]["prefetch"]["observations"]
    assert services[0]["description"]


def test_a_card_is_valid_and_orders_nothing(app: App) -> None:
    signature = app.service.catalogue.get("tiny").signature
    object.__setattr__(signature, "fields", _FIELDS)

    answer = ask(app, "POST", "/cds-services/tiny", _HOOK).json

    assert list(answer) == ["cards"]  # no systemActions
    (card,) = answer["cards"]
    wanted = sigmoid_of(np.array([[64, 1, 6.0 * 38.665, np.nan]], np.float32))[0, 0]
    assert card["summary"].startswith(f"{wanted:.0%} probability")
    assert len(card["summary"]) < 140
    assert card["indicator"] in ("info", "warning", "critical")
    assert card["source"]["label"]
    assert "smoker" in card["detail"]
    assert "suggestions" not in card
    uuid.UUID(card["uuid"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (_changed(hook="order-sign"), 400),
        (_changed(hookInstance="1"), 400),
        (_changed(context={}), 400),
        (_changed(context=None), 400),
        (_changed(context={"patientId": "1288992"}), 400),
        (_changed(context={"patientId": "", "userId": "Practitioner/1"}), 400),
        (_changed(fhirServer=None), 400),
        (_changed(prefetch=None), 412),
        (_changed(prefetch={}), 412),
        (_changed(prefetch={"patient": {"resourceType": "Group"}}), 412),
        (_changed(prefetch={"patient": {"resourceType": "Patient"}}), 412),
    ],
)
def test_a_request_that_cannot_be_answered_says_why(body: dict[str, Any], status: int) -> None:
    with pytest.raises(Problem) as caught:
        parse_hook(body, _SIGNATURE)

    assert caught.value.status == status


@pytest.mark.parametrize("status", ["entered-in-error", "cancelled"])
def test_a_withdrawn_observation_is_not_used(status: str) -> None:
    body = copy.deepcopy(_HOOK)
    for entry in body["prefetch"]["observations"]["entry"]:
        entry["resource"]["status"] = status

    assert np.isnan(parse_hook(body, _SIGNATURE)[0, 2])


def test_feedback_is_recorded_without_the_comment(app: App, tmp_path: Path) -> None:
    card = str(uuid.uuid4())
    reason = {"reason": {"code": "disagree"}, "userComment": "John Doe is healthy"}
    entry = {
        "card": card,
        "outcome": "overridden",
        "overrideReason": reason,
        "outcomeTimestamp": "2026-03-01T10:00:00Z",
    }

    reply = ask(app, "POST", "/cds-services/tiny/feedback", {"feedback": [entry]})
    assert app.service.audit is not None
    app.service.audit.close()

    (line,) = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert reply.status == 200
    assert json.loads(line)["action"] == "cds-overridden"
    assert (json.loads(line)["card"], json.loads(line)["reason"]) == (card, "disagree")
    assert "John" not in line


_RESOURCE = st.recursive(
    st.none() | st.integers(-5, 5) | st.sampled_from(["Patient", "Observation", "2093-3", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["resourceType", "entry", "resource", "code", "coding", "component"]),
            inner,
        )
    ),
    max_leaves=10,
)


@given(patient=_RESOURCE, observations=_RESOURCE)
def test_no_record_crashes_the_parser(patient: object, observations: object) -> None:
    body = _changed(prefetch={"patient": patient, "observations": observations})

    try:
        inputs = parse_hook(body, _SIGNATURE)
    except Problem:
        return

    assert inputs.shape == (1, 4)


_CARD, _WHEN = str(uuid.uuid4()), "2026-03-01T10:00:00Z"


def _accepted(suggestions: object) -> dict[str, Any]:
    return {
        "card": _CARD,
        "outcome": "accepted",
        "acceptedSuggestions": suggestions,
        "outcomeTimestamp": _WHEN,
    }


@pytest.mark.parametrize(
    "feedback",
    [
        None,
        [],
        [{}],
        [{"card": "1", "outcome": "accepted", "outcomeTimestamp": _WHEN}],
        [{"card": _CARD, "outcome": "maybe", "outcomeTimestamp": _WHEN}],
        [{"card": _CARD, "outcome": "accepted"}],
        [{"card": _CARD, "outcome": "accepted", "outcomeTimestamp": "yesterday"}],
        [_accepted([{}])],
        [_accepted("x")],
        [_accepted([{"id": _CARD}] * 33)],
        [_accepted([])] * 257,
    ],
)
def test_malformed_feedback_is_refused(app: App, feedback: object) -> None:
    assert ask(app, "POST", "/cds-services/tiny/feedback", {"feedback": feedback}).status == 400
