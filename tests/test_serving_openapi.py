"""The adapter's description is true, and nothing that fits it, or nearly, is a server error."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from jsonschema import Draft202012Validator
from release_samples import SIGNATURE, publish_sample
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from serving_client import adapter, ask

from fedward.core.identity import Identity
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.openapi import describe, templates
from fedward.serving.routes import ROUTES
from fedward.serving.service import Service
from fedward.serving.store import Store

_DESCRIPTION = describe([SIGNATURE])


def test_every_path_is_described_and_is_the_routes_own() -> None:
    described = set()
    for route in ROUTES:
        found = templates(route.name)
        assert found or route.name in ("page", "events"), route.name
        for template in found:
            path = re.sub(r"\{version\}", "1", template.replace("{model}", "tiny"))
            assert route.path.fullmatch(path), template
            assert route.method.lower() in _DESCRIPTION["paths"][template]
            described.add(template)
    assert described == set(_DESCRIPTION["paths"])


def test_who_may_ask_is_described() -> None:
    for route in ROUTES:
        for template in templates(route.name):
            operation = _DESCRIPTION["paths"][template][route.method.lower()]
            assert (operation["security"] == []) == (route.roles is None), template


@pytest.mark.parametrize(
    ("patient", "fits"),
    [
        ({"age": 63}, True),
        ({"age": {"value": 63, "unit": "a"}, "sex": "male", "smoker": True}, True),
        ({"age": 63, "cholesterol": None, "sex": 1}, True),
        ({"sex": "male"}, False),
        ({"age": 17}, False),
        ({"age": 63, "sex": "robot"}, False),
        ({"age": 63, "height": 180}, False),
        ({"age": 63, "cholesterol": {"value": 6, "unit": "furlong"}}, False),
    ],
)
def test_a_patient_that_fits_the_description_is_one_that_is_answered(
    patient: Any, fits: bool, tmp_path: Path
) -> None:
    from fedward.core.release import read_release
    from fedward.serving.engine import start_engine

    identity = Identity.generate_publisher()
    release = read_release(publish_sample(tmp_path, identity), identity.public)
    app = App(Service(Catalogue([start_engine(release)])))
    schema = ask(app, "GET", "/openapi.json").json["components"]["schemas"]["Patient"]

    assert Draft202012Validator(schema).is_valid(patient) is fits
    assert (ask(app, "POST", "/predict", patient).status == 200) is fits


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("openapi")
    identity = Identity.generate_publisher()
    store = Store(folder / "store")
    store.install(publish_sample(folder / "registry", identity), identity.public)
    with adapter(store.folder, folder / "ready.json", "--rate", "1e9") as (address, _):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


_OPERATIONS = [
    (template, method) for template, methods in _DESCRIPTION["paths"].items() for method in methods
]


@pytest.mark.e2e
@pytest.mark.parametrize(("template", "method"), _OPERATIONS)
def test_schemathesis_finds_no_server_error(api: Any, template: str, method: str) -> None:
    operation = api[template][method.upper()]
    described = _DESCRIPTION["paths"][template][method]["responses"]

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

        @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def answered(case: Any) -> None:
            response = case.call()
            case.validate_response(response, checks=[not_a_server_error])
            # What no path can hold is another path, or none.
            assert str(response.status_code) in {*described, "404", "405"}

        with contextlib.suppress(Unsatisfiable):  # there is nothing wrong to be said
            answered()
