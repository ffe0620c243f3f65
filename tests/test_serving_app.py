"""The adapter's answers: to clinicians, to Open Inference Protocol clients, and to nonsense."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from release_samples import SIGNATURE, publish_sample, sigmoid_of, valid_inputs
from serving_client import ask

from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.guard import Guard
from fedward.serving.http import MAX_BODY
from fedward.serving.service import Service

_INFER = "/v2/models/tiny/infer"
_PATIENT = {"age": 63, "sex": "male", "cholesterol": 240, "smoker": True}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> App:
    identity = Identity.generate_publisher()
    folder = publish_sample(tmp_path_factory.mktemp("registry"), identity)
    return App(Service(Catalogue([start_engine(read_release(folder, identity.public))])))


def _request(inputs: Any, **more: Any) -> dict[str, Any]:
    array = np.asarray(inputs, np.float32)
    tensor = {
        "name": "input",
        "datatype": "FP32",
        "shape": list(array.shape),
        "data": [None if np.isnan(v) else float(v) for v in array.ravel()],
    }
    return {"inputs": [tensor], **more}


# --- a clinician's request ---------------------------------------------------------------------


def test_a_patient_is_answered_with_all_that_a_reader_needs(app: App) -> None:
    reply = ask(app, "POST", "/predict", {"age": 63, "sex": "male"})

    assert reply.status == 200
    wanted = sigmoid_of(np.array([[63, 1, np.nan, np.nan]], np.float32))
    assert reply.json["probability"] == pytest.approx(float(wanted[0, 0]), abs=1e-5)
    assert reply.json["model"] == {"name": "tiny", "version": 1}
    assert reply.json["missing"] == ["cholesterol", "smoker"]
    assert reply.json["privacy"].startswith("Differentially private: epsilon 3.98")
    assert reply.json["outcome"] == SIGNATURE.outcome


@pytest.mark.parametrize(
    "same",
    [
        {"sex": "MALE"},
        {"sex": 1},
        {"smoker": "yes"},
        {"smoker": 1},
        {"cholesterol": {"value": 240}},
        {"cholesterol": {"value": 240, "unit": "mg/dL"}},
        {"cholesterol": {"value": 240 / 38.665, "unit": "mmol/L"}},
        {"age": {"value": 63, "unit": "a"}},
    ],
)
def test_a_value_may_be_written_in_several_ways(app: App, same: dict[str, Any]) -> None:
    wanted = ask(app, "POST", "/predict", _PATIENT).json["probability"]

    got = ask(app, "POST", "/predict/tiny", {**_PATIENT, **same}).json["probability"]

    assert got == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "field", "allowed"),
    [
        ({"age": 17}, "age", "18 to 120 years"),
        ({"age": "old"}, "age", "18 to 120 years"),
        ({"age": None}, "age", "18 to 120 years"),
        ({"age": True}, "age", "18 to 120 years"),
        ({"age": 10**400}, "age", "18 to 120 years"),
        ({"sex": "m"}, "sex", "one of female (0), male (1)"),
        ({"sex": 0.5}, "sex", "one of female (0), male (1)"),
        ({"sex": {"value": "male", "unit": "1"}}, "sex", "one of female (0), male (1)"),
        ({"smoker": []}, "smoker", "one of no (0), yes (1)"),
        ({"cholesterol": {"value": 240, "unit": "mmol/L"}}, "cholesterol", "50 to 1000 mg/dl"),
        ({"cholesterol": {"value": 240, "unit": "kPa"}}, "cholesterol", "50 to 1000 mg/dl"),
        ({"cholesterol": {"value": 240, "unit": 3}}, "cholesterol", "50 to 1000 mg/dl"),
        ({"cholesterol": {"much": 240}}, "cholesterol", "50 to 1000 mg/dl"),
        ({"cholesterole": 240}, "cholesterole", "age, sex, cholesterol, smoker"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(
    app: App, wrong: dict[str, Any], field: str, allowed: str
) -> None:
    reply = ask(app, "POST", "/predict", {**_PATIENT, **wrong})

    assert reply.status == 422
    assert (reply.json["field"], reply.json["allowed"]) == (field, allowed)
    assert field in reply.json["error"]


def test_a_misspelt_field_is_guessed(app: App) -> None:
    reply = ask(app, "POST", "/predict", {"age": 63, "colesterol": 240})

    assert "did you mean cholesterol?" in reply.json["error"]


def test_a_refusal_does_not_repeat_the_patients_value(app: App) -> None:
    reply = ask(app, "POST", "/predict", {**_PATIENT, "cholesterol": 98765})

    assert b"98765" not in reply.body


# --- the Open Inference Protocol ---------------------------------------------------------------


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_inference_gives_the_models_numbers(app: App, binary_in: bool, binary_out: bool) -> None:
    inputs = valid_inputs(5)
    request = _request(inputs, id="r1", parameters={"binary_data_output": binary_out})
    headers, tail = {}, b""
    if binary_in:
        tail = inputs.tobytes()
        del request["inputs"][0]["data"]
        request["inputs"][0]["parameters"] = {"binary_data_size": len(tail)}
    head = json.dumps(request).encode()
    if binary_in:
        headers["Inference-Header-Content-Length"] = str(len(head))

    reply = ask(app, "POST", _INFER, head + tail, headers)

    assert reply.status == 200
    cut = int(reply.headers.get("inference-header-content-length", len(reply.body)))
    answer = json.loads(reply.body[:cut])
    output = answer["outputs"][0]
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("r1", "tiny", "1")
    assert (output["name"], output["datatype"], output["shape"]) == ("probability", "FP32", [5, 1])
    got = np.frombuffer(reply.body[cut:], "<f4") if binary_out else np.array(output["data"])
    np.testing.assert_allclose(got, sigmoid_of(inputs)[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_compressed_body_is_read(app: App, encoding: str, pack: Any) -> None:
    body = pack(json.dumps(_request(valid_inputs(1))).encode())

    assert ask(app, "POST", _INFER, body, {"Content-Encoding": encoding}).status == 200


def test_a_large_batch_gives_the_same_as_its_rows(app: App) -> None:
    inputs = valid_inputs(1000)

    answer = ask(app, "POST", _INFER, _request(inputs)).json

    np.testing.assert_allclose(answer["outputs"][0]["data"], sigmoid_of(inputs)[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [
        ("GET", "/v2/health/live", {"live": True}),
        ("GET", "/v2/health/ready", {"ready": True, "live": True}),
        ("GET", "/v2/models/tiny/ready", {"name": "tiny", "ready": True}),
        ("GET", "/v2/models/tiny/versions/1/ready", {"name": "tiny", "ready": True}),
    ],
)
def test_health_is_answered(app: App, method: str, path: str, wanted: object) -> None:
    reply = ask(app, method, path)

    assert (reply.status, reply.json) == (200, wanted)


def test_metadata_describes_input_and_output(app: App) -> None:
    assert ask(app, "GET", "/v2").json["extensions"] == ["binary_tensor_data", "model_repository"]
    assert ask(app, "GET", "/v2/models/tiny").json == {
        "name": "tiny",
        "versions": ["1"],
        "platform": "onnx_onnxv1",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "probability", "datatype": "FP32", "shape": [-1, 1]}],
    }
    assert ask(app, "POST", "/v2/repository/index").json[0]["name"] == "tiny"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v2/models/none", 404),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/models/tiny/versions/2/infer", 404),
        ("POST", "/predict/none", 404),
        ("GET", _INFER, 405),
        ("GET", "/predict", 405),
        ("DELETE", "/v2/health/ready", 405),
        ("POST", "/v2/models/tiny", 405),
        ("POST", "/predict", 400),
        ("POST", _INFER, 400),
    ],
)
def test_a_wrong_path_or_method_is_answered_in_json(
    app: App, method: str, path: str, status: int
) -> None:
    reply = ask(app, method, path)

    assert reply.status == status
    assert reply.json["error"]
    assert reply.headers["content-type"] == "application/json"


def _tensor(**changed: Any) -> dict[str, Any]:
    tensor = _request([[63, 1, 240, 0]])["inputs"][0]
    return {"inputs": [{**tensor, **changed}]}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({}, 400),
        ({"inputs": []}, 400),
        ({"inputs": "x"}, 400),
        ({"inputs": [3]}, 400),
        ({**_tensor(), "id": 3}, 400),
        ({**_tensor(), "outputs": [{"name": "other"}]}, 400),
        ({**_tensor(), "outputs": 3}, 400),
        ({**_tensor(), "parameters": 3}, 400),
        (_tensor(name="other"), 400),
        (_tensor(datatype="BYTES"), 400),
        (_tensor(datatype=[]), 400),
        (_tensor(shape=[1, 3]), 400),
        (_tensor(shape=[2, 2]), 400),
        (_tensor(shape=[-1, 4]), 400),
        (_tensor(shape=[10**18, 10**18, 4]), 400),
        (_tensor(shape="4"), 400),
        (_tensor(shape=[0, 4], data=[]), 400),
        (_tensor(data=["1", "2", "3", "4"]), 400),
        (_tensor(data=[True, True, True, True]), 400),
        (_tensor(data=[{}, 1, 240, 0]), 400),
        (_tensor(data=[[1, 2], [3]]), 400),
        (_tensor(data=[10**400, 1, 240, 0]), 400),
        (_tensor(data=None), 400),
        (_tensor(parameters={"binary_data_size": 16}), 400),
        (_tensor(data=[17, 1, 240, 0]), 422),
        (_tensor(data=[1e39, 1, 240, 0]), 422),
        (_tensor(data=[None, 1, 240, 0]), 422),
        (_tensor(data=[63, 0.5, 240, 0]), 422),
        (_tensor(shape=[5000, 4], data=[63, 1, 240, 0] * 5000), 413),
    ],
)
def test_a_malformed_inference_is_answered_with_why(
    app: App, request_: dict[str, Any], status: int
) -> None:
    assert ask(app, "POST", _INFER, request_).status == status


def test_a_row_out_of_range_is_named(app: App) -> None:
    inputs = valid_inputs(9)
    inputs[6, 2] = 5000

    reply = ask(app, "POST", _INFER, _request(inputs))

    assert reply.status == 422
    assert (reply.json["row"], reply.json["field"]) == (6, "cholesterol")


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Content-Length": str(MAX_BODY + 1)}, b"{}", 413),
        ({"Content-Length": "9" * 30}, b"{}", 413),
        ({}, b" " * (MAX_BODY + 1), 413),
        ({"Content-Encoding": "gzip"}, gzip.compress(b" " * (MAX_BODY + 1)), 413),
        ({"Content-Encoding": "gzip"}, b"not gzip", 400),
        ({"Content-Encoding": "gzip"}, gzip.compress(b"{}")[:-9], 400),
        ({"Content-Encoding": "br"}, b"{}", 415),
        ({"Inference-Header-Content-Length": "99"}, b"{}", 400),
        ({"Inference-Header-Content-Length": "-1"}, b"{}", 400),
        ({}, b"[" * 100_000, 400),
        ({}, b"\xff\xfe", 400),
    ],
)
def test_a_body_that_cannot_be_read_is_answered(
    app: App, headers: dict[str, str], body: bytes, status: int
) -> None:
    assert ask(app, "POST", _INFER, body, headers).status == status


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab1.µ", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["name", "data", "value", "unit", "id"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(changed=st.dictionaries(st.sampled_from(list(_tensor()["inputs"][0])), _JSON))
def test_no_tensor_is_answered_with_a_server_error(app: App, changed: dict[str, Any]) -> None:
    assert ask(app, "POST", _INFER, _tensor(**changed)).status in (200, 400, 413, 422)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(changed=st.dictionaries(st.sampled_from(list(_PATIENT)), _JSON))
def test_no_patient_is_answered_with_a_server_error(app: App, changed: dict[str, Any]) -> None:
    assert ask(app, "POST", "/predict", {**_PATIENT, **changed}).status in (200, 422)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    method=st.sampled_from(["GET", "POST", "PUT"]),
    path=st.text("/abv2.%é", max_size=30),
    body=st.binary(),
)
def test_no_junk_is_answered_with_a_server_error(
    app: App, method: str, path: str, body: bytes
) -> None:
    assert ask(app, method, "/" + path, body).status in (200, 400, 404, 405, 422)


def test_a_store_is_served_by_its_newest_version(tmp_path: Path) -> None:
    identity = Identity.generate_publisher()
    catalogue = Catalogue([])
    served = App(Service(catalogue))
    assert ask(served, "GET", "/v2/health/ready").status == 503

    for bias in (-2.0, -1.0):
        folder = publish_sample(tmp_path, identity, bias=bias)
        catalogue.promote(start_engine(read_release(folder, identity.public)))

    assert ask(served, "POST", "/predict", _PATIENT).json["model"]["version"] == 2


@given(rows=st.lists(st.lists(st.floats(width=32), min_size=4, max_size=4), min_size=1, max_size=6))
def test_few_rows_and_many_are_guarded_alike(rows: list[list[float]]) -> None:
    guard = Guard(SIGNATURE)
    inputs = np.array(rows, np.float32)

    assert guard._first_of_few(inputs) == guard._first(inputs)
    assert guard._first_of_few(valid_inputs(50)) is None
    assert guard._first(valid_inputs(50)) is None
