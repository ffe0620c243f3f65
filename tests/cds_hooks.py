"""CDS Hooks 2.0.1: the schemas of what a service answers, and the specification's own requests.

Written down from cds-hooks.hl7.org/2.0, "Discovery", "Calling a CDS Service", "CDS Service
Response" and "Feedback": every table there is an object here, REQUIRED is `required`, and an
attribute that no table has is an error. "JSON elements SHALL NOT be null or empty".
"""

from typing import Any

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string", "minLength": 1}
_URL: Schema = {"type": "string", "pattern": r"^[a-z]+://"}
_UUID: Schema = {"type": "string", "pattern": r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}


def _object(required: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "required": required.split(),
        "properties": {**properties, "extension": {"type": "object", "minProperties": 1}},
        "additionalProperties": False,
        "minProperties": 1,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


_CODING = _object("code system", code=_TEXT, system=_TEXT, display=_TEXT)
_SOURCE = _object("label", label=_TEXT, url=_URL, icon=_URL, topic=_CODING)
_LINK = _object(
    "label url type", label=_TEXT, url=_URL, type={"enum": ["absolute", "smart"]}, appContext=_TEXT
)
_ACTION = _object(
    "type description",
    type={"enum": ["create", "update", "delete"]},
    description=_TEXT,
    resource={"type": "object"},
    resourceId=_TEXT,
)
_SUGGESTION = _object(
    "label", label=_TEXT, uuid=_UUID, isRecommended={"type": "boolean"}, actions=_list(_ACTION)
)
_CARD: Schema = {
    **_object(
        "summary indicator source",
        uuid=_UUID,
        summary={"type": "string", "minLength": 1, "maxLength": 139},
        detail=_TEXT,
        indicator={"enum": ["info", "warning", "critical"]},
        source=_SOURCE,
        suggestions=_list(_SUGGESTION),
        selectionBehavior={"enum": ["at-most-one", "any"]},
        # "the CDS Service MUST populate a `display` value for each reason's Coding"
        overrideReasons=_list({**_CODING, "required": ["code", "system", "display"]}),
        links=_list(_LINK),
    ),
    "dependentRequired": {"suggestions": ["selectionBehavior"]},
}
RESPONSE = _object("cards", cards={"type": "array", "items": _CARD}, systemActions=_list(_ACTION))
DISCOVERY = _object(
    "services",
    services={
        "type": "array",
        "items": _object(
            "hook description id",
            hook={"type": "string", "pattern": r"^[a-z]+(-[a-z]+)*$"},
            title=_TEXT,
            description=_TEXT,
            id={"type": "string", "pattern": r"^[^/?#\s]+$"},
            prefetch={"type": "object", "minProperties": 1, "additionalProperties": _TEXT},
            usageRequirements=_TEXT,
        ),
    },
)

_CALL: Schema = {
    "hookInstance": "d1577c69-dfbe-44ad-ba6d-3e05e953b2ea",
    "fhirServer": "http://hooks.smarthealthit.org:9080",
    "hook": "patient-view",
    "fhirAuthorization": {
        "access_token": "some-opaque-fhir-access-token",
        "token_type": "Bearer",
        "expires_in": 300,
        "scope": "patient/Patient.read patient/Observation.read",
        "subject": "cds-service4",
    },
    "context": {
        "userId": "Practitioner/example",
        "patientId": "1288992",
        "encounterId": "89284",
    },
    "prefetch": {
        "patientToGreet": {
            "resourceType": "Patient",
            "gender": "male",
            "birthDate": "1925-12-23",
            "id": "1288992",
            "active": True,
        }
    },
}
# "Calling a CDS Service", example: it asks for a patient under that service's own prefetch key.
CALL_OF_ANOTHER_SERVICE = _CALL
# The same under the key that our discovery asks for.
CALL: Schema = {**_CALL, "prefetch": {"patient": _CALL["prefetch"]["patientToGreet"]}}
# "Example prefetch data": a patient and a search that found something else.
CALL_WITH_OBSERVATIONS: Schema = {
    **CALL,
    "prefetch": {
        "patient": {"resourceType": "Patient", "gender": "male", "birthDate": "1974-12-25"},
        "observations": {
            "resourceType": "Bundle",
            "type": "searchset",
            "entry": [
                {
                    "resource": {
                        "resourceType": "Observation",
                        "code": {
                            "coding": [
                                {
                                    "system": "http://loinc.org",
                                    "code": "4548-4",
                                    "display": "Hemoglobin A1c",
                                }
                            ]
                        },
                    }
                }
            ],
        },
        "user": "123",
    },
}
# "Prefetch Template": a key for which the client has no data has the value null.
CALL_WITHOUT_DATA: Schema = {**CALL, "prefetch": {"patient": None, "observations": None}}
CALL_WITH_NO_PREFETCH: Schema = {name: part for name, part in CALL.items() if name != "prefetch"}
# "Extensions", first example.
CALL_WITH_EXTENSION: Schema = {
    **CALL,
    "extension": {
        "com.example.timestamp": "2017-11-27T22:13:25Z",
        "com.cds-hooks.sandbox.myextension-practitionerspecialty": "gastroenterology",
    },
}
# "Feedback": accepted, overridden without a reason, overridden with one.
FEEDBACK: tuple[Schema, ...] = (
    {
        "card": "4e0a3a1e-3283-4575-ab82-028d55fe2719",
        "outcome": "accepted",
        "acceptedSuggestions": [{"id": "e56e1945-20b3-4393-8503-a1a20fd73152"}],
        "outcomeTimestamp": "2020-12-11T00:00:00Z",
    },
    {
        "card": "f6b95768-b1c8-40dc-8385-bf3504b82ffb",
        "outcome": "overridden",
        "outcomeTimestamp": "2020-12-11T00:00:00Z",
    },
    {
        "card": "9368d37b-283f-44a0-93ea-547cebab93ed",
        "outcome": "overridden",
        "overrideReason": {
            "reason": {
                "code": "d7ecf885",
                "system": "https://example.com/cds-hooks/override-reason-system",
            },
            "userComment": "A comment entered by the clinician.",
        },
        "outcomeTimestamp": "2020-12-11T00:00:00Z",
    },
)
# "CDS Service Response", examples: the schema must take them.
RESPONSES: tuple[Schema, ...] = (
    {"cards": []},
    {
        "cards": [
            {
                "uuid": "4e0a3a1e-3283-4575-ab82-028d55fe2719",
                "summary": "Example Card",
                "indicator": "info",
                "detail": "This is an example card.",
                "source": {
                    "label": "Static CDS Service Example",
                    "url": "https://example.com",
                    "icon": "https://example.com/img/icon-100px.png",
                },
                "links": [
                    {"label": "Google", "url": "https://google.com", "type": "absolute"},
                    {
                        "label": "SMART Example App",
                        "url": "https://smart.example.com/launch",
                        "type": "smart",
                        "appContext": '{"session":3456356,"settings":{"module":4235}}',
                    },
                ],
            },
            {
                "summary": "Another card",
                "indicator": "warning",
                "source": {"label": "Static CDS Service Example"},
                "overrideReasons": [
                    {
                        "code": "reason-code-provided-by-service",
                        "system": "http://example.org/cds-services/override-reasons",
                        "display": "Patient refused",
                    }
                ],
            },
        ]
    },
)
