"""The CDS Hooks specification's own requests are answered validly by its schema."""

import copy
import json
from pathlib import Path
from typing import Any

import cds_hooks
import pytest
from jsonschema import Draft202012Validator, ValidationError
from release_samples import SIGNATURE, publish_sample
from serving_client import ask

from fedward.core.fields import Field
from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving.app import App
from fedward.serving.audit import AuditLog
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.service import Service

_LOINC = {"age": "30525-0", "sex": "46098-0"}


def _known(field: Field) -> Field:
    parts = {name: getattr(field, name) for name in field.__slots__}
    return Field(**{**parts, "loinc": _LOINC.get(field.name, field.loinc)})


@pytest.fixture
def app(tmp_path: Path) -> App:
    identity = Identity.generate_publisher()
    folder = publish_sample(tmp_path / "registry", identity)
    engine = start_engine(read_release(folder, identity.public))
    # The sample's age and sex, with the codes by which a record knows them.
    fields = tuple(map(_known, SIGNATURE.fields))
    object.__setattr__(engine.release.signature, "fields", fields)
    return App(Service(Catalogue([engine]), audit=AuditLog(tmp_path / "audit.jsonl")))


def _check(value: object, schema: cds_hooks.Schema) -> None:
    Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize("response", cds_hooks.RESPONSES)
def test_the_schema_takes_the_specifications_own_responses(response: Any) -> None:
    _check(response, cds_hooks.RESPONSE)


@pytest.mark.parametrize(
    "change",
    [
        {"summary": "x" * 140},
        {"summary": None},
        {"indicator": "hard-stop"},
        {"source": {}},
        {"detail": ""},
        {"suggestions": [{"label": "x"}]},
        {"overrideReasons": [{"code": "x", "system": "y"}]},
        {"colour": "red"},
    ],
)
def test_the_schema_refuses_what_the_specification_does(change: dict[str, Any]) -> None:
    response = copy.deepcopy(cds_hooks.RESPONSES[1])
    response["cards"][0].update(change)

    with pytest.raises(ValidationError):
        _check(response, cds_hooks.RESPONSE)


def test_discovery_is_valid_by_the_schema(app: App) -> None:
    _check(ask(app, "GET", "/cds-services").json, cds_hooks.DISCOVERY)
    empty = ask(App(Service(Catalogue([]))), "GET", "/cds-services")
    assert (empty.status, empty.json) == (200, {"services": []})


@pytest.mark.parametrize(
    "call",
    [cds_hooks.CALL, cds_hooks.CALL_WITH_OBSERVATIONS, cds_hooks.CALL_WITH_EXTENSION],
    ids=["example", "prefetch data", "extension"],
)
def test_the_specifications_calls_get_valid_cards(app: App, call: Any) -> None:
    reply = ask(app, "POST", "/cds-services/tiny", call)

    assert reply.status == 200
    _check(reply.json, cds_hooks.RESPONSE)
    assert len(reply.json["cards"]) == 1
    assert "systemActions" not in reply.json


@pytest.mark.parametrize(
    "call",
    [
        cds_hooks.CALL_OF_ANOTHER_SERVICE,
        cds_hooks.CALL_WITHOUT_DATA,
        cds_hooks.CALL_WITH_NO_PREFETCH,
    ],
    ids=["another prefetch key", "null", "no prefetch"],
)
def test_a_call_without_the_data_needed_is_answered_with_412(app: App, call: Any) -> None:
    assert ask(app, "POST", "/cds-services/tiny", call).status == 412


def test_the_specifications_feedback_is_logged_without_comments(app: App, tmp_path: Path) -> None:
    together = {"feedback": list(cds_hooks.FEEDBACK)}
    replies = [
        ask(app, "POST", "/cds-services/tiny/feedback", {"feedback": [one]})
        for one in cds_hooks.FEEDBACK
    ]
    replies.append(ask(app, "POST", "/cds-services/tiny/feedback", together))
    assert app.service.audit is not None
    app.service.audit.close()

    text = (tmp_path / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [reply.status for reply in replies] == [200] * 4
    assert len(lines) == 6
    assert [(line["action"], line["card"], line["reason"]) for line in lines[:3]] == [
        ("cds-accepted", "4e0a3a1e-3283-4575-ab82-028d55fe2719", ""),
        ("cds-overridden", "f6b95768-b1c8-40dc-8385-bf3504b82ffb", ""),
        ("cds-overridden", "9368d37b-283f-44a0-93ea-547cebab93ed", "other"),
    ]
    assert lines[0]["accepted"] == "e56e1945-20b3-4393-8503-a1a20fd73152"
    assert lines[0]["when"] == "2020-12-11T00:00:00+00:00"
    assert "comment" not in text


def test_every_override_is_counted(app: App) -> None:
    ask(app, "POST", "/cds-services/tiny/feedback", {"feedback": list(cds_hooks.FEEDBACK)})

    text = app.service.metrics()

    assert 'fedward_cds_feedback_total{model="tiny",outcome="accepted"} 1' in text
    assert 'fedward_cds_feedback_total{model="tiny",outcome="overridden"} 2' in text


def test_a_recorded_value_that_no_patient_can_have_gets_a_card_that_says_so(app: App) -> None:
    call = copy.deepcopy(cds_hooks.CALL)
    call["prefetch"]["patient"]["birthDate"] = "1790-01-01"
    assert app.service.audit is not None

    reply = ask(app, "POST", "/cds-services/tiny", call)
    app.service.audit.close()

    (card,) = reply.json["cards"]
    assert reply.status == 200
    _check(reply.json, cds_hooks.RESPONSE)
    assert card["summary"].startswith("No probability")
    assert "age is out of range; allowed: 18 to 120" in card["detail"]
    assert "%" not in card["summary"] + card["detail"]
    assert 'refused_values_total{model="tiny",field="age"} 1' in app.service.metrics()
    assert "predicted_rows_total{" not in app.service.metrics()
