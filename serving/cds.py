"""CDS Hooks 2.0.1: advice inside the electronic record, as cards.

cds-hooks.hl7.org. One `patient-view` service for each model: what it needs of the patient comes
as FHIR R4 prefetch, by LOINC code where the model's fields have one. Cards inform; there is never
a system action: the clinician decides.
"""

import datetime
import re
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import Field, ModelSignature
from fedward.serving import clinical
from fedward.serving.problems import Problem

_LONGEST_SUMMARY = 140
_AGE, _SEX = "30525-0", "46098-0"
_DATE = re.compile(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?")
_OUTCOMES = ("accepted", "overridden")
_OVERRIDE_REASONS = {
    "known": "Already known",
    "disagree": "Clinical judgement differs",
    "data": "The recorded values are wrong or old",
}
_REASONS_SYSTEM = "https://fedward.example/override-reasons"
_MOST_FEEDBACK, _MOST_ACCEPTED = 256, 32
_LOINC_SYSTEM = "http://loinc.org"


def service_of(signature: ModelSignature) -> dict[str, Any]:
    """The model's entry in the discovery answer."""
    codes = ",".join(
        f"{_LOINC_SYSTEM}|{field.loinc}" for field in signature.fields if _observed(field)
    )
    prefetch = {"patient": "Patient/{{context.patientId}}"}
    if codes:
        prefetch["observations"] = (
            f"Observation?patient={{{{context.patientId}}}}&code={codes}&_sort=-date&_count=100"
        )
    return {
        "hook": "patient-view",
        "id": signature.model,
        "title": f"Fedward: {signature.model}",
        "description": f"Estimates the probability of: {signature.outcome}.",
        "prefetch": prefetch,
        "usageRequirements": "Advice from recorded values only; the clinician decides.",
    }


def parse_hook(body: Mapping[str, Any], signature: ModelSignature) -> NDArray[np.float32]:
    """A hook request's prefetched patient as the model's input.

    Returns:
        float32, shape `(1, fields)`; what the record does not hold is missing.

    Raises:
        Problem: 400 for a malformed request, 412 where the data needed did not come along, 422
            for a recorded value that no patient can have.
    """
    if body.get("hook") != "patient-view":
        raise Problem(400, "`hook` must be patient-view")
    _uuid(body.get("hookInstance"), "`hookInstance` must be a UUID")
    context = body.get("context")
    if not isinstance(context, dict) or not all(
        isinstance(context.get(name), str) and context[name] for name in ("patientId", "userId")
    ):
        raise Problem(400, "`context` must hold `patientId` and `userId`")
    if "fhirAuthorization" in body and not isinstance(body.get("fhirServer"), str):
        raise Problem(400, "`fhirAuthorization` needs `fhirServer`")
    fetched = body.get("prefetch")
    prefetch: dict[str, Any] = fetched if isinstance(fetched, dict) else {}
    patient = prefetch.get("patient")
    if not isinstance(patient, dict) or patient.get("resourceType") != "Patient":
        raise Problem(412, "`prefetch` must hold `patient`; this service fetches nothing itself")
    values: dict[str, Any] = {}
    for field in signature.fields:
        if field.loinc == _AGE:
            values[field.name] = _age(patient.get("birthDate"))
        elif field.loinc == _SEX:
            gender = patient.get("gender")
            values[field.name] = gender if gender in field.codes else None
    values |= _observations(prefetch.get("observations"), signature)
    known = {name: value for name, value in values.items() if value is not None}
    if any(f.required and f.name not in known for f in signature.fields) or not known:
        raise Problem(412, "the record does not hold what this model needs")
    return clinical.parse_patient(known, signature)


def cards(
    signature: ModelSignature,
    inputs: NDArray[np.float32],
    outputs: NDArray[np.float32],
    *,
    privacy: str,
) -> dict[str, Any]:
    """The answer to a hook: one card."""
    probability = float(outputs[0, 0])
    missing = [
        field.name
        for field, gone in zip(signature.fields, np.isnan(inputs[0]), strict=True)
        if gone
    ]
    summary = f"{probability:.0%} probability: {signature.outcome}"
    if len(summary) >= _LONGEST_SUMMARY:
        summary = summary[: _LONGEST_SUMMARY - 2] + "…"
    detail = [
        f"Model {signature.model}, version {signature.version}. {privacy}",
        f"Not in the record: {', '.join(missing) or 'nothing'}.",
        "A probability to consider with all else that is known; the clinician decides.",
    ]
    indicator = "warning" if probability >= signature.threshold else "info"
    reasons = [
        {"code": code, "system": _REASONS_SYSTEM, "display": display}
        for code, display in _OVERRIDE_REASONS.items()
    ]
    card = _card(signature, summary, detail, indicator=indicator)
    return {"cards": [{**card, "overrideReasons": reasons}]}


def abstention(signature: ModelSignature, problem: Problem) -> dict[str, Any]:
    """The answer where the record holds a value that no patient can have: a card that says so."""
    none = f"Model {signature.model}, version {signature.version}, gives no probability for it"
    detail = [
        f"In the record, {problem.error}.",
        f"{none}; correct the value, and open the record again.",
    ]
    return {"cards": [_card(signature, "No probability: the record holds a wrong value", detail)]}


def _card(
    signature: ModelSignature, summary: str, detail: list[str], *, indicator: str = "info"
) -> dict[str, Any]:
    return {
        "uuid": str(uuid.uuid4()),
        "summary": summary,
        "detail": "\n\n".join(detail),
        "indicator": indicator,
        "source": {"label": f"Fedward {signature.model}"},
    }


def parse_feedback(body: Mapping[str, Any]) -> list[dict[str, str]]:
    """What became of cards: `card`, `outcome`, `reason`, `accepted`, `when`.

    The comment is left out, as it may be about the patient, and so is a code that is not one of
    ours: `other` stands for it.

    Raises:
        Problem: 400 for a malformed request.
    """
    entries = body.get("feedback")
    if not isinstance(entries, list) or not 0 < len(entries) <= _MOST_FEEDBACK:
        raise Problem(400, f"`feedback` must be a list of 1 to {_MOST_FEEDBACK} entries")
    return [_feedback(entry) for entry in entries]


def _feedback(entry: object) -> dict[str, str]:
    if not isinstance(entry, dict) or entry.get("outcome") not in _OUTCOMES:
        raise Problem(400, "each `outcome` must be accepted or overridden")
    when = entry.get("outcomeTimestamp")
    try:
        moment = datetime.datetime.fromisoformat(str(when))
    except ValueError:
        raise Problem(400, "each `outcomeTimestamp` must be an ISO time in UTC") from None
    suggestions = entry.get("acceptedSuggestions", [])
    if (
        not isinstance(suggestions, list)
        or len(suggestions) > _MOST_ACCEPTED
        or not all(isinstance(one, dict) for one in suggestions)
    ):
        raise Problem(400, f"`acceptedSuggestions` must be a list of at most {_MOST_ACCEPTED}")
    reason = entry.get("overrideReason")
    inner = reason.get("reason") if isinstance(reason, dict) else None
    code = inner.get("code") if isinstance(inner, dict) else None
    ours = isinstance(code, str) and code in _OVERRIDE_REASONS
    return {
        "card": _uuid(entry.get("card"), "each `card` must be the UUID of a card"),
        "outcome": str(entry["outcome"]),
        "reason": "" if code is None else str(code) if ours else "other",
        "accepted": ",".join(
            _uuid(one.get("id"), "each suggestion's `id` must be a UUID") for one in suggestions
        ),
        "when": moment.isoformat(),
    }


def _uuid(value: object, problem: str) -> str:
    try:
        return str(uuid.UUID(str(value)))
    except ValueError:
        raise Problem(400, problem) from None


def _observed(field: Field) -> bool:
    return field.loinc is not None and field.loinc not in (_AGE, _SEX)


def _age(birth_date: object) -> float | None:
    """Completed years today; None where the date is not known to the year."""
    match = _DATE.fullmatch(birth_date) if isinstance(birth_date, str) else None
    if match is None:
        return None
    today = datetime.datetime.now(tz=datetime.UTC).date()
    year, month, day = int(match[1]), int(match[2] or 7), int(match[3] or 1)
    return float(today.year - year - ((today.month, today.day) < (month, day)))


def _observations(bundle: object, signature: ModelSignature) -> dict[str, Any]:
    """The latest value of each field that has a LOINC code."""
    entries = bundle.get("entry") if isinstance(bundle, dict) else None
    latest: dict[str, tuple[str, Any]] = {}
    for entry in entries if isinstance(entries, list) else []:
        resource = entry.get("resource") if isinstance(entry, dict) else None
        if not isinstance(resource, dict) or resource.get("resourceType") != "Observation":
            continue
        if resource.get("status") in ("cancelled", "entered-in-error"):
            continue
        for field in signature.fields:
            value = _quantity(resource, field) if _observed(field) else None
            when = str(resource.get("effectiveDateTime", ""))
            if value is not None and when >= latest.get(field.name, ("", None))[0]:
                latest[field.name] = when, value
    return {name: value for name, (_, value) in latest.items()}


def _quantity(resource: Mapping[str, Any], field: Field) -> Any:
    """The observation's value if it is of this field, with its unit."""
    candidates = [resource, *_dicts(resource.get("component"))]
    for candidate in candidates:
        code = candidate.get("code")
        codings = _dicts(code.get("coding")) if isinstance(code, dict) else []
        if not any(
            coding.get("system") == _LOINC_SYSTEM and coding.get("code") == field.loinc
            for coding in codings
        ):
            continue
        quantity = candidate.get("valueQuantity")
        if not isinstance(quantity, dict) or not isinstance(quantity.get("value"), (int, float)):
            continue
        unit = quantity.get("code") or quantity.get("unit")
        known = {field.unit.casefold(), *(name.casefold() for name in field.units)}
        if isinstance(unit, str) and unit.casefold() in known:
            return {"value": quantity["value"], "unit": unit}
    return None


def _dicts(value: object) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
