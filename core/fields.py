"""What a published model takes and gives: `signature.json` of a release, as frozen types.

The publisher writes it from the task's schema; the adapter reads it to turn what a person types
into the model's raw input, to refuse what no patient can have, and to say what is allowed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

FORMAT = 1
INPUT, OUTPUT = "input", "probability"
Kind = Literal["number", "category", "flag"]
# UCUM writes for machines; a person reads these.
_PLAIN_UNITS = {"1": "", "a": " years", "mm[Hg]": " mmHg", "/min": " per minute", "Cel": " °C"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One clinical value that the model takes, in the order of the input's columns.

    Attributes:
        name: What a request calls it.
        title: What a person calls it.
        kind: `number`, `category` (one of `codes`), or `flag` (no or yes, 0 or 1).
        unit: UCUM unit of the model's raw input; "1" where there is none.
        low: Least value a patient can have, in `unit`.
        high: Greatest value a patient can have, in `unit`.
        codes: For a category and a flag, the input's number for each name.
        required: Whether the model refuses to do without it; NaN stands for missing otherwise.
        units: Other units and how to convert: value * factor + offset gives `unit`.
        loinc: LOINC code where known.
    """

    name: str
    title: str
    kind: Kind
    unit: str = "1"
    low: float | None = None
    high: float | None = None
    codes: Mapping[str, float]
    required: bool = False
    units: Mapping[str, tuple[float, float]]
    loinc: str | None = None

    def allowed(self) -> str:
        """What this field may be, in words for an error message or a form."""
        if self.kind != "number":
            return "one of " + ", ".join(f"{name} ({code:g})" for name, code in self.codes.items())
        unit = _PLAIN_UNITS.get(self.unit, f" {self.unit}")
        if self.low is None or self.high is None:
            return f"a number{unit}"
        return f"{self.low:g} to {self.high:g}{unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSignature:
    """A released model's interface.

    Attributes:
        model: The model's name in registry, store and URLs.
        version: Rises by one with each release of `model`.
        task: The task that it was trained for.
        outcome: What the probability is of, in words.
        fields: The input's columns in order; the input is float32 `(n, len(fields))`.
        outputs: Names of the output's columns; the output is float32 `(n, len(outputs))`.
        threshold: Probability from which the card calls a patient positive.
    """

    model: str
    version: int
    task: str
    outcome: str
    fields: tuple[Field, ...]
    outputs: tuple[str, ...] = (OUTPUT,)
    threshold: float = 0.5

    def to_json(self) -> dict[str, Any]:
        """As `signature.json`."""
        return {
            "format": FORMAT,
            "model": self.model,
            "version": self.version,
            "task": self.task,
            "outcome": self.outcome,
            "threshold": self.threshold,
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, len(self.fields)]}],
            "outputs": [
                {
                    "name": OUTPUT,
                    "datatype": "FP32",
                    "shape": [-1, len(self.outputs)],
                    "columns": list(self.outputs),
                }
            ],
            "missing": "NaN",
            "fields": [asdict(field) for field in self.fields],
        }


def parse_signature(value: object) -> ModelSignature:
    """Read `signature.json`'s value.

    Raises:
        ValueError: A key is missing or unknown, or a value is of the wrong kind; says which.
    """
    top = _dict(
        value,
        "signature.json",
        "format model version task outcome threshold inputs outputs missing fields",
    )
    if top["format"] != FORMAT:
        raise ValueError(f"format is {top['format']!r} and this version reads {FORMAT}")
    version = top["version"]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError("version is not a whole number from 1")
    entries = top["fields"]
    if not isinstance(entries, list) or not entries:
        raise ValueError("fields is not a list of at least one field")
    fields = tuple(_field(entry) for entry in entries)
    if len({field.name for field in fields}) != len(fields):
        raise ValueError("two fields have the same name")
    outputs = top["outputs"]
    if not isinstance(outputs, list) or len(outputs) != 1:
        raise ValueError("outputs is not a list of one output")
    columns = _dict(outputs[0], "outputs", "name datatype shape columns")["columns"]
    if not isinstance(columns, list) or not columns:
        raise ValueError("the output has no columns")
    signature = ModelSignature(
        model=_text(top["model"], "model"),
        version=version,
        task=_text(top["task"], "task"),
        outcome=_text(top["outcome"], "outcome"),
        fields=fields,
        outputs=tuple(_text(column, "an output's column") for column in columns),
        threshold=_number(top["threshold"], "threshold"),
    )
    if signature.to_json()["inputs"] != top["inputs"]:
        raise ValueError("inputs do not fit fields")
    return signature


def _field(value: object) -> Field:
    entry = _dict(value, "a field", "name title kind unit low high codes required units loinc")
    name = _text(entry["name"], "a field's name")
    if entry["kind"] not in get_args(Kind) or not isinstance(entry["required"], bool):
        raise ValueError(f"field {name}: kind or required is malformed")
    codes = {
        _text(key, "a code"): _number(code, f"field {name}: a code")
        for key, code in _dict(entry["codes"], f"field {name}: codes").items()
    }
    if (entry["kind"] != "number") != bool(codes):
        raise ValueError(f"field {name}: a category and a flag need codes, a number takes none")
    units: dict[str, tuple[float, float]] = {}
    for unit, conversion in _dict(entry["units"], f"field {name}: units").items():
        if not isinstance(conversion, list) or len(conversion) != 2:  # noqa: PLR2004 (factor, offset)
            raise ValueError(f"field {name}: unit {unit} needs a factor and an offset")
        factor, offset = (_number(part, f"field {name}: unit {unit}") for part in conversion)
        units[_text(unit, "a unit")] = (factor, offset)
    low, high = (
        None if entry[end] is None else _number(entry[end], f"field {name}: {end}")
        for end in ("low", "high")
    )
    return Field(
        name=name,
        title=_text(entry["title"], f"field {name}: title"),
        kind=cast("Kind", entry["kind"]),
        unit=_text(entry["unit"], f"field {name}: unit"),
        low=low,
        high=high,
        codes=codes,
        required=entry["required"],
        units=units,
        loinc=None if entry["loinc"] is None else _text(entry["loinc"], f"field {name}: loinc"),
    )


def _dict(value: object, what: str, keys: str | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")  # noqa: TRY004 (a file's content, not a type)
    if keys is not None and set(value) != set(keys.split()):
        odd = set(value) ^ set(keys.split())
        raise ValueError(f"{what}: missing or unknown: {', '.join(sorted(map(str, odd)))}")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} is not a text")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what} is not a finite number")
    return float(value)
