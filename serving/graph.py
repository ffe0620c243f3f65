"""GraphQL: what is served, and one prediction a request, for clients that speak nothing else.

It costs many times what the other protocols do (docs/serving.md). Needs the extra `graphql`. The
types hold no cycle, so that a query is as deep as they are and no deeper.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from fedward.core.errors import ConfigError
from fedward.serving.catalogue import Live
from fedward.serving.problems import Problem
from fedward.serving.roles import Caller
from fedward.serving.service import Service

_MOST_CHARACTERS = 8192
_MOST_TOKENS = 1000
_SCHEMA = """
"A clinical value by name: a number in the field's unit or in another, or a category's name."
input Value { field: String!  number: Float  text: String  unit: String }
type Field {
  name: String!  title: String!  kind: String!  unit: String!
  low: Float  high: Float  required: Boolean!  allowed: String!
}
type Model { name: String!  version: Int!  outcome: String!  privacy: String!  fields: [Field!]! }
type Output { name: String!  probability: Float! }
type Prediction {
  model: String!  version: Int!  outcome: String!  outputs: [Output!]!
  missing: [String!]!  privacy: String!  advice: String!  receipt: String
}
type Query {
  models: [Model!]!
  "One patient; once in a request."
  predict(model: String, values: [Value!]!): Prediction!
}
"""


def import_graphql() -> Any:
    """graphql-core. Raises `ConfigError` where it is not installed."""
    try:
        import graphql
    except ImportError as error:
        raise ConfigError(
            "needs graphql-core; run: pip install fedward[graphql]", file="/graphql"
        ) from error
    return graphql


async def answer(service: Service, body: Mapping[str, Any], *, caller: Caller) -> dict[str, Any]:
    """A query's answer: `data`, and `errors` where there are any.

    Raises:
        Problem: 400 for what is no request; 404 without graphql-core.
    """
    try:
        graphql = import_graphql()
    except ConfigError as error:
        raise Problem(404, str(error)) from error
    query, variables, name = body.get("query"), body.get("variables"), body.get("operationName")
    if not isinstance(query, str) or len(query) > _MOST_CHARACTERS:
        raise Problem(400, f"`query` must be a text of at most {_MOST_CHARACTERS} characters")
    if not isinstance(variables, (dict, type(None))) or not isinstance(name, (str, type(None))):
        raise Problem(400, "`variables` must be an object and `operationName` a text")
    root = _Root(service, caller)
    try:
        document = graphql.parse(query, max_tokens=_MOST_TOKENS)
        errors = graphql.validate(_schema(), document, max_errors=5)
    except (graphql.GraphQLError, RecursionError) as error:
        errors = [graphql.GraphQLError(getattr(error, "message", "the query is too deep"))]
    if errors:
        return {"errors": [_said(error) for error in errors]}
    result = await _waited(
        graphql.execute(_schema(), document, root, variable_values=variables, operation_name=name)
    )
    said = {"errors": [_said(error) for error in result.errors]} if result.errors else {}
    return {"data": result.data, **said}


class _Root:
    """Resolves the two queries for one request."""

    def __init__(self, service: Service, caller: Caller) -> None:
        self._service, self._caller, self._asked = service, caller, False

    def models(self, _: Any) -> list[dict[str, Any]]:
        catalogue = self._service.catalogue
        return [_model(catalogue.get(name)) for name in catalogue.names()]

    async def predict(
        self, _: Any, *, values: list[dict[str, Any]], model: str | None = None
    ) -> dict[str, Any]:
        if self._asked:
            raise Problem(400, "one prediction a request; use another protocol for more")
        self._asked = True
        live = self._service.catalogue.get(model)
        patient = {value["field"]: _typed(value) for value in values}
        said = await self._service.answer_patient(live, patient, caller=self._caller)
        outputs = said.get("probabilities") or {live.signature.outputs[0]: said["probability"]}
        return {
            **said,
            "model": live.signature.model,
            "version": live.signature.version,
            "outputs": [{"name": name, "probability": p} for name, p in outputs.items()],
        }


def _typed(value: Mapping[str, Any]) -> Any:
    given = value.get("text") if value.get("number") is None else value["number"]
    return {"value": given, "unit": value["unit"]} if value.get("unit") is not None else given


def _model(live: Live) -> dict[str, Any]:
    signature = live.signature
    return {
        "name": signature.model,
        "version": signature.version,
        "outcome": signature.outcome,
        "privacy": live.privacy,
        "fields": [
            {
                "name": field.name,
                "title": field.title,
                "kind": field.kind,
                "unit": field.unit,
                "low": field.low,
                "high": field.high,
                "required": field.required,
                "allowed": field.allowed(),
            }
            for field in signature.fields
        ],
    }


@cache
def _schema() -> Any:
    return import_graphql().build_schema(_SCHEMA)


async def _waited(result: Any) -> Any:
    return await result if hasattr(result, "__await__") else result


def _said(error: Any) -> dict[str, Any]:
    """An error without what was sent: a message of our own, or of the query's text."""
    original = getattr(error, "original_error", None)
    if isinstance(original, Problem):
        return {"message": original.error, "extensions": original.to_json()}
    if original is not None:
        return {"message": "internal error; see the adapter's log"}
    return {"message": error.message}
