"""`POST /predict`: named clinical fields, as a person would type them, and an answer in words."""

import difflib
import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import Field, ModelSignature
from fedward.serving.problems import Problem

_DECODE = json.JSONDecoder().decode
_ADVICE = "A probability to consider with all else that is known; the clinician decides."


def parse_json(body: bytes) -> dict[str, Any]:
    """A request's JSON object. Raises `Problem` 400."""
    try:
        # Without a look for UTF-16, which `json.loads` takes, too, and RFC 8259 does not.
        value = _DECODE(body.decode())
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body is not a JSON object")
    return value


def parse_patient(values: dict[str, Any], signature: ModelSignature) -> NDArray[np.float32]:
    """A patient's values, by name, as the model's raw input.

    A value is a number in the field's unit, `{"value": 6.2, "unit": "mmol/L"}`, the name of a
    category, true or false, or null; what is left out is missing.

    Returns:
        float32, shape `(1, fields)`; NaN is missing.

    Raises:
        Problem: 422, naming the field and what it may be.
    """
    names = [field.name for field in signature.fields]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise Problem(
                422,
                f"{name[:64]!r} is no field of this model; {hint}fields: {', '.join(names)}",
                field=name[:64],
                allowed=", ".join(names),
            )
    row = [_value(field, values.get(field.name)) for field in signature.fields]
    return np.array([row], dtype=np.float32)


def answer(
    signature: ModelSignature,
    inputs: NDArray[np.float32],
    outputs: NDArray[np.float32],
    *,
    privacy: str,
) -> dict[str, Any]:
    """What `/predict` answers for one patient."""
    missing = [
        field.name
        for field, gone in zip(signature.fields, np.isnan(inputs[0]), strict=True)
        if gone
    ]
    probabilities = [round(float(value), 6) for value in outputs[0]]
    said: dict[str, Any] = (
        {"probability": probabilities[0]}
        if len(probabilities) == 1
        else {"probabilities": dict(zip(signature.outputs, probabilities, strict=True))}
    )
    return {
        **said,
        "outcome": signature.outcome,
        "model": {"name": signature.model, "version": signature.version},
        "missing": missing,
        "privacy": privacy,
        "advice": _ADVICE,
    }


def _value(field: Field, value: object) -> float:
    unit: str | None = None
    if isinstance(value, dict):
        if not set(value) <= {"value", "unit"} or not isinstance(value.get("unit", ""), str):
            raise _not_allowed(field, 'takes {"value": ..., "unit": "..."}')
        unit, value = value.get("unit"), value.get("value")
    if value is None:
        return math.nan
    if field.kind != "number":
        if unit is not None:
            raise _not_allowed(field, "has no unit")
        return _code(field, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _not_allowed(field, "is not a number")
    factor, offset = _conversion(field, unit)
    try:
        converted = float(value) * factor + offset
    except OverflowError:
        converted = math.inf
    low = -math.inf if field.low is None else field.low
    high = math.inf if field.high is None else field.high
    if not (low <= converted <= high and math.isfinite(converted)):
        raise _not_allowed(field, "is out of range")
    return converted


def _code(field: Field, value: object) -> float:
    if field.kind == "flag" and isinstance(value, bool):
        return field.codes["yes" if value else "no"]
    if isinstance(value, str):
        for name, code in field.codes.items():
            if name.casefold() == value.strip().casefold():
                return code
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        # The guard cannot see that a name was meant: a number is a code or nothing.
        for code in field.codes.values():
            if code == value:
                return code
    raise _not_allowed(field, "is not a known category")


def _conversion(field: Field, unit: str | None) -> tuple[float, float]:
    if unit is None or unit.casefold() == field.unit.casefold():
        return 1.0, 0.0
    for name, conversion in field.units.items():
        if name.casefold() == unit.casefold():
            return conversion
    raise _not_allowed(
        field, f"has an unknown unit; units: {', '.join((field.unit, *field.units))}"
    )


def _not_allowed(field: Field, problem: str) -> Problem:
    return Problem(
        422,
        f"{field.name} {problem}; allowed: {field.allowed()}",
        field=field.name,
        allowed=field.allowed(),
    )
