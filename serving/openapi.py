"""What can be asked of the adapter, as OpenAPI 3.1, for clients and for those who test it."""

from collections.abc import Iterable, Mapping
from typing import Any

from fedward import __version__
from fedward.core.fields import INPUT, OUTPUT, Field, ModelSignature
from fedward.serving.explanations import METHODS

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_OBJECT: Schema = {"type": "object"}
_DATATYPES = (
    "FP64", "FP32", "FP16", "INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16",
    "UINT8",
)  # fmt: skip
# Route name: path templates, what it does, the request's schema by name, statuses beside 200.
_PATHS: Mapping[str, tuple[tuple[str, ...], str, str | None, tuple[int, ...]]] = {
    "infer": (
        ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"),
        "Open Inference Protocol v2", "InferRequest", (400, 404, 413, 415, 422),
    ),
    "predict": (
        ("/predict", "/predict/{model}"),
        "One patient by named fields", "Patient", (400, 404, 413, 415, 422),
    ),
    "explain": (
        ("/explain", "/explain/{model}"),
        "The same, with each value's contribution", "Patient", (400, 404, 413, 415, 422),
    ),
    "outcomes": (
        ("/outcomes", "/outcomes/{model}"),
        "What became of a patient", "Outcome", (400, 404, 409, 413, 415, 422),
    ),
    "ready": (("/v2/health/ready",), "Whether a model is served", None, (503,)),
    "live": (("/v2/health/live",), "Whether the adapter runs", None, ()),
    "server": (("/v2",), "The adapter", None, ()),
    "model": (
        ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"),
        "A model's input and output", None, (404,),
    ),
    "model-ready": (
        ("/v2/models/{model}/ready", "/v2/models/{model}/versions/{version}/ready"),
        "Whether a model is served", None, (404,),
    ),
    "index": (("/v2/repository/index",), "All models", "Anything", (413, 415, 400)),
    "v1-predict": (
        ("/v1/models/{model}:predict",), "KServe V1", "Instances", (400, 404, 413, 415, 422),
    ),
    "v1-explain": (
        ("/v1/models/{model}:explain",), "KServe V1", "Instances", (400, 404, 413, 415, 422),
    ),
    "v1-model": (("/v1/models/{model}",), "Whether a model is served", None, (404,)),
    "v1-models": (("/v1/models",), "All models", None, ()),
    "cds-services": (("/cds-services",), "CDS Hooks discovery", None, ()),
    "cds-hook": (
        ("/cds-services/{model}",),
        "CDS Hooks patient-view", "Hook", (400, 404, 412, 413, 415, 422),
    ),
    "cds-feedback": (
        ("/cds-services/{model}/feedback",),
        "What became of cards", "Feedback", (400, 404, 413, 415),
    ),
    "metrics": (("/metrics",), "Prometheus text", None, ()),
    "monitor": (("/monitor", "/monitor/{model}"), "Drift and calibration", None, (404,)),
    "status": (("/status",), "What the page shows", None, ()),
    "decide": (
        ("/manage/models/{model}/approve", "/manage/models/{model}/decline"),
        "Decide on what waits", "Decision", (400, 403, 404, 409, 413, 415, 422),
    ),
    "roll-back": (
        ("/manage/models/{model}/roll-back",),
        "Serve the version before", "Anything", (400, 403, 404, 409, 413, 415),
    ),
    "graphql": (
        ("/graphql",), "GraphQL, with the extra of this name", "Query", (400, 404, 413, 415),
    ),
    "erase": (
        ("/manage/erase",),
        "Erase a patient's values from the audit log", "Erasure", (400, 403, 404, 413, 415),
    ),
    "openapi": (("/openapi.json",), "This description", None, ()),
}  # fmt: skip
_ANYBODY = ("ready", "live", "cds-services")


def describe(signatures: Iterable[ModelSignature]) -> dict[str, Any]:
    """The description, with the fields of the models that are served."""
    served = tuple(signatures)
    paths: dict[str, Any] = {}
    for name, (templates, summary, body, statuses) in _PATHS.items():
        for template in templates:
            operation = _operation(name, template, summary, body, statuses)
            method = "get" if body is None else "post"
            paths.setdefault(template, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Fedward adapter", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": _schemas(served),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def templates(name: str) -> tuple[str, ...]:
    """The paths of a route, as described; none for the page and its files."""
    return _PATHS[name][0] if name in _PATHS else ()


def _operation(
    name: str, template: str, summary: str, body: str | None, statuses: tuple[int, ...]
) -> dict[str, Any]:
    kind = "text/plain" if name == "metrics" else "application/json"
    reply: Schema = _TEXT if name == "metrics" else {}
    said: dict[str, Any] = {"200": {"description": "", "content": {kind: {"schema": reply}}}}
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    also = statuses if name in _ANYBODY else (401, 403, 429, *statuses)
    for status in sorted(set(also)):
        content = refused if status != 503 else {kind: {"schema": {}}}  # noqa: PLR2004 (HTTP)
        said[str(status)] = {"description": "", "content": content}
    operation: dict[str, Any] = {
        "operationId": name + template.replace("{", "").replace("}", "").replace("/", "-"),
        "summary": summary,
        "parameters": [
            {"name": part, "in": "path", "required": True, "schema": _path_part(part)}
            for part in ("model", "version")
            if "{" + part + "}" in template
        ],
        "responses": said,
        "security": [] if name in _ANYBODY else [{"key": []}],
    }
    if name.endswith("explain"):
        size = {"type": "string", "pattern": r"^[1-9]\d{0,3}x[1-9]\d{0,3}$"}
        methods = {"type": "string", "enum": list(METHODS), "default": "shapley"}
        for part, schema in (("method", methods), ("grid", size), ("window", size)):
            operation["parameters"].append({"name": part, "in": "query", "schema": schema})
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body}"}
        operation["requestBody"] = {
            "required": name != "roll-back",
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _path_part(name: str) -> Schema:
    pattern = r"^[^/:]+$" if name == "model" else r"^[^/]+$"
    return {"type": "string", "minLength": 1, "pattern": pattern}


def _schemas(served: tuple[ModelSignature, ...]) -> dict[str, Schema]:
    numbers: Schema = {"type": "array", "items": {"type": ["number", "null"]}}
    patients = [_patient(signature) for signature in served]
    return {
        "Patient": patients[0] if len(patients) == 1 else {"anyOf": patients} if patients else {},
        "InferRequest": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": _TEXT,
                "parameters": _OBJECT,
                "inputs": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "datatype", "shape"],
                        "properties": {
                            "name": {"const": INPUT},
                            "datatype": {"enum": list(_DATATYPES)},
                            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                            "data": {"anyOf": [numbers, {"type": "array", "items": numbers}]},
                            "parameters": _OBJECT,
                        },
                    },
                },
                "outputs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name"],
                        "properties": {"name": {"const": OUTPUT}, "parameters": _OBJECT},
                    },
                },
            },
        },
        "Instances": {
            "type": "object",
            "required": ["instances"],
            "properties": {
                "instances": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"anyOf": [numbers, {"$ref": "#/components/schemas/Patient"}]},
                }
            },
        },
        "Outcome": {
            "type": "object",
            "required": ["receipt", "outcome"],
            "properties": {
                "receipt": _TEXT,
                "outcome": {"type": "boolean"},
                "groups": {"type": "object", "additionalProperties": _TEXT},
            },
        },
        "Hook": {
            "type": "object",
            "required": ["hook", "hookInstance", "context"],
            "properties": {
                "hook": {"const": "patient-view"},
                "hookInstance": {"type": "string", "format": "uuid"},
                "fhirServer": _TEXT,
                "fhirAuthorization": _OBJECT,
                "context": {
                    "type": "object",
                    "required": ["userId", "patientId"],
                    "properties": {"userId": _TEXT, "patientId": _TEXT},
                },
                "prefetch": {
                    "type": "object",
                    "properties": {
                        "patient": _OBJECT,
                        "observations": {"type": ["object", "null"]},
                    },
                },
            },
        },
        "Feedback": {
            "type": "object",
            "required": ["feedback"],
            "properties": {
                "feedback": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["card", "outcome", "outcomeTimestamp"],
                        "properties": {
                            "card": {"type": "string", "format": "uuid"},
                            "outcome": {"enum": ["accepted", "overridden"]},
                            "outcomeTimestamp": {"type": "string", "format": "date-time"},
                            "acceptedSuggestions": {"type": "array", "items": _OBJECT},
                            "overrideReason": _OBJECT,
                        },
                    },
                }
            },
        },
        "Decision": {
            "type": "object",
            "required": ["version"],
            "properties": {"version": {"type": "integer", "minimum": 1}},
        },
        "Query": {
            "type": "object",
            "required": ["query"],
            "properties": {
                "query": _TEXT,
                "variables": {"type": ["object", "null"]},
                "operationName": {"type": ["string", "null"]},
            },
        },
        "Erasure": {
            "type": "object",
            "required": ["patient"],
            "properties": {"patient": {"type": "string", "minLength": 1, "maxLength": 128}},
        },
        "Anything": {},
        "Problem": {
            "type": "object",
            "required": ["error"],
            "properties": {"error": _TEXT, "field": _TEXT, "allowed": _TEXT, "row": _WHOLE},
        },
    }


def _patient(signature: ModelSignature) -> Schema:
    return {
        "type": "object",
        "properties": {field.name: _value(field) for field in signature.fields},
        "required": [field.name for field in signature.fields if field.required],
        "additionalProperties": False,
    }


def _value(field: Field) -> Schema:
    described: Schema = {"description": f"{field.title}; {field.allowed()}"}
    if field.kind != "number":
        named: list[Schema] = [{"enum": [*field.codes, *field.codes.values()]}]
        named += [{"type": "boolean"}] if field.kind == "flag" else []
        return {**described, "anyOf": [*named, {"type": "null"}]}
    bounds = {"minimum": field.low, "maximum": field.high}
    number = {"type": "number", **{name: end for name, end in bounds.items() if end is not None}}
    units = [field.unit, *field.units]
    measured = {
        "type": "object",
        "required": ["value"],
        "properties": {"value": _NUMBER, "unit": {"enum": units}},
        "additionalProperties": False,
    }
    return {**described, "anyOf": [number, measured, {"type": "null"}]}
