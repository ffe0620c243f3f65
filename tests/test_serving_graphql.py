"""GraphQL: metadata and one prediction, the same as by the other protocols."""

import re
import sys
from typing import Any

import graphql
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_graphql import from_schema
from release_samples import SIGNATURE, publish_sample
from serving_client import ask

from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving import graph
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.service import Service

_PREDICT = """query One($values: [Value!]!) {
  predict(values: $values) { model version outcome missing privacy outputs { name probability } }
}"""


_TWO = """{
  a: predict(values: [{field: "age", number: 63}]) { version }
  b: predict(values: [{field: "age", number: 64}]) { version }
}"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> App:
    identity = Identity.generate_publisher()
    folder = publish_sample(tmp_path_factory.mktemp("registry"), identity)
    return App(Service(Catalogue([start_engine(read_release(folder, identity.public))])))


def _ask(app: App, query: str, **more: Any) -> Any:
    reply = ask(app, "POST", "/graphql", {"query": query, **more})
    assert reply.status == 200
    return reply.json


def test_a_prediction_is_the_one_of_every_protocol(app: App) -> None:
    values = [
        {"field": "age", "number": 63},
        {"field": "sex", "text": "male"},
        {"field": "cholesterol", "number": 6.2, "unit": "mmol/L"},
    ]
    patient = {"age": 63, "sex": "male", "cholesterol": {"value": 6.2, "unit": "mmol/L"}}

    got = _ask(app, _PREDICT, variables={"values": values})["data"]["predict"]
    wanted = ask(app, "POST", "/predict", patient).json

    assert got == {
        "model": "tiny",
        "version": 1,
        "outcome": wanted["outcome"],
        "missing": wanted["missing"],
        "privacy": wanted["privacy"],
        "outputs": [{"name": "probability", "probability": wanted["probability"]}],
    }


def test_metadata_describes_what_is_served(app: App) -> None:
    (model,) = _ask(app, "{ models { name version fields { name unit low required } } }")["data"][
        "models"
    ]

    assert (model["name"], model["version"]) == ("tiny", 1)
    assert [field["name"] for field in model["fields"]] == [f.name for f in SIGNATURE.fields]
    assert model["fields"][0] == {"name": "age", "unit": "a", "low": 18, "required": True}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ('{ predict(values: [{field: "age", number: 17}]) { version } }', "age is out of range"),
        ('{ predict(values: [{field: "agee", number: 63}]) { version } }', "did you mean age"),
        ('{ predict(model: "x", values: []) { version } }', "not found"),
        ("{ nothing }", "Cannot query field"),
        ("{", "Syntax Error"),
        ("mutation { models { name } }", "not configured|not support"),
        ("{ " + "a " * 1200 + "}", "tokens"),
        (_TWO, "one prediction a request"),
    ],
)
def test_what_is_wrong_is_said(app: App, query: str, message: str) -> None:
    answer = _ask(app, query)

    assert re.search(message, answer["errors"][0]["message"])


@pytest.mark.parametrize(
    "body", [{}, {"query": 3}, {"query": "x" * 9000}, {"query": "{}", "variables": []}]
)
def test_what_is_no_request_is_refused(app: App, body: Any) -> None:
    assert ask(app, "POST", "/graphql", body).status == 400


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(query=from_schema(graphql.build_schema(graph._SCHEMA)) | st.text('{}()a: "', max_size=40))
def test_no_query_is_a_server_error(app: App, query: str) -> None:
    answer = ask(app, "POST", "/graphql", {"query": query})

    assert answer.status in (200, 400)
    assert "internal error" not in answer.body.decode()


def test_without_the_extra_it_is_named_and_all_else_works(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "graphql", None)

    answer = ask(app, "POST", "/graphql", {"query": "{ models { name } }"})

    assert answer.status == 404
    assert "fedward[graphql]" in answer.json["error"]
    assert ask(app, "POST", "/predict", {"age": 63}).status == 200
