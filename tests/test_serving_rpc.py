"""gRPC, and unmodified clients of other projects over both protocols."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from release_samples import publish_sample, sigmoid_of, valid_inputs
from serving_client import adapter

from fedward.core.identity import Identity
from fedward.serving.gate import add_key
from fedward.serving.protobuf import messages
from fedward.serving.store import Store

_IDENTITY = Identity.generate_publisher()
_SERVICE = "/inference.GRPCInferenceService/"


def _store(folder: Path) -> Store:
    store = Store(folder / "store")
    store.install(publish_sample(folder / "registry", _IDENTITY), _IDENTITY.public)
    return store


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """HTTP's and gRPC's, without the scheme."""
    folder = tmp_path_factory.mktemp("rpc")
    ready = folder / "ready.json"
    with adapter(_store(folder).folder, ready, "--grpc-port", "0") as (address, _):
        where = json.loads(ready.read_text())
        yield address.removeprefix("http://"), f"{where['host']}:{where['grpc_port']}"


def _call(address: str, method: str, request: Any, answer: str, **metadata: str) -> Any:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            _SERVICE + method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=messages()[answer].FromString,
        )
        return call(request, metadata=tuple(metadata.items()), timeout=20)


def _request(inputs: np.ndarray, *, raw: bool, datatype: str = "FP32") -> Any:
    request = messages()["ModelInferRequest"](model_name="tiny", id="r1")
    tensor = request.inputs.add(name="input", datatype=datatype, shape=inputs.shape)
    if raw:
        request.raw_input_contents.append(inputs.tobytes())
    elif datatype == "FP32":
        tensor.contents.fp32_contents.extend(inputs.ravel().tolist())
    else:
        tensor.contents.fp64_contents.extend(inputs.ravel().tolist())
    return request


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("datatype", "dtype"), [("FP32", np.float32), ("FP64", np.float64)])
def test_inference_gives_the_models_numbers(
    addresses: tuple[str, str], raw: bool, datatype: str, dtype: type
) -> None:
    inputs = valid_inputs(7)
    request = _request(inputs.astype(dtype), raw=raw, datatype=datatype)

    answer = _call(addresses[1], "ModelInfer", request, "ModelInferResponse")

    got = (
        np.frombuffer(answer.raw_output_contents[0], "<f4")
        if raw
        else np.array(answer.outputs[0].contents.fp32_contents)
    )
    assert (answer.id, answer.model_version, list(answer.outputs[0].shape)) == ("r1", "1", [7, 1])
    np.testing.assert_allclose(got, sigmoid_of(inputs)[:, 0], atol=1e-6)


def _wrong(change: str) -> Any:
    request = _request(np.array([[63, 1, 240, 1]], np.float32), raw=False)
    tensor = request.inputs[0]
    match change:
        case "model":
            request.model_name = "none"
        case "version":
            request.model_version = "9"
        case "name":
            tensor.name = "x"
        case "shape":
            tensor.shape[1] = 3
        case "negative":
            tensor.shape[0] = -1
        case "datatype":
            tensor.datatype = "BYTES"
        case "value":
            tensor.contents.fp32_contents[0] = 500
        case "raw":
            request.raw_input_contents.append(b"abc")
        case _:
            request.outputs.add(name="x")
    return request


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("model", "NOT_FOUND"),
        ("version", "NOT_FOUND"),
        ("name", "INVALID_ARGUMENT"),
        ("shape", "INVALID_ARGUMENT"),
        ("negative", "INVALID_ARGUMENT"),
        ("datatype", "INVALID_ARGUMENT"),
        ("value", "INVALID_ARGUMENT"),
        ("raw", "INVALID_ARGUMENT"),
        ("output", "INVALID_ARGUMENT"),
    ],
)
def test_a_wrong_request_is_answered_with_why(
    addresses: tuple[str, str], change: str, code: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        _call(addresses[1], "ModelInfer", _wrong(change), "ModelInferResponse")

    assert caught.value.code().name == code
    assert caught.value.details()


def test_keys_guard_grpc_too(tmp_path: Path) -> None:
    store = _store(tmp_path)
    keys = store.folder / "state" / "keys.json"
    clinician = add_key(keys, name="ward", role="clinician")
    operator = add_key(keys, name="it", role="operator")
    ready = tmp_path / "ready.json"
    request = _request(valid_inputs(1), raw=True)
    codes = []
    with adapter(store.folder, ready, "--grpc-port", "0") as _:
        where = json.loads(ready.read_text())
        address = f"{where['host']}:{where['grpc_port']}"
        live = _call(address, "ServerLive", messages()["Empty"](), "ServerLiveResponse")
        answer = _call(
            address,
            "ModelInfer",
            request,
            "ModelInferResponse",
            authorization=f"Bearer {clinician}",
        )
        for key in ("", operator):
            with pytest.raises(grpc.RpcError) as caught:
                _call(
                    address,
                    "ModelInfer",
                    request,
                    "ModelInferResponse",
                    authorization=f"Bearer {key}",
                )
            codes.append(caught.value.code().name)

    assert live.live
    assert len(answer.raw_output_contents) == 1
    assert codes == ["UNAUTHENTICATED", "PERMISSION_DENIED"]


def test_a_call_with_a_request_key_gets_one_version_of_a_canary(tmp_path: Path) -> None:
    store = _store(tmp_path)
    rollout = {"shadow": 1, "canary": 100000, "share": 0.5, "max_slowdown": 1000}
    policy = {"approval": False, "rollout": rollout}
    (store.folder / "policy.json").write_text(json.dumps(policy))
    ready = tmp_path / "ready.json"
    request = _request(valid_inputs(1), raw=True)

    with adapter(store.folder, ready, "--grpc-port", "0") as (url, _):
        where = json.loads(ready.read_text())
        address = f"{where['host']}:{where['grpc_port']}"
        newer = publish_sample(tmp_path / "registry", _IDENTITY, bias=-1.99)
        store.install(newer, _IDENTITY.public)

        def version(key: str | None) -> str:
            metadata = {} if key is None else {"x-request-key": key}
            answer = _call(address, "ModelInfer", request, "ModelInferResponse", **metadata)
            return str(answer.model_version)

        def stage() -> str:
            rollout = httpx.get(f"{url}/status").json()["rollout"]
            return str(rollout.get("tiny", {}).get("stage"))

        deadline = time.monotonic() + 30
        while stage() != "canary":
            assert time.monotonic() < deadline
            version(None)
            time.sleep(0.05)
        seen = {key: {version(key) for _ in range(4)} for key in "abcdefghijkl"}
        over_rest = {
            key: httpx.post(
                f"{url}/predict", json={"age": 63}, headers={"X-Request-Key": key}
            ).json()["model"]["version"]
            for key in seen
        }

    assert all(len(versions) == 1 for versions in seen.values())
    assert {min(versions) for versions in seen.values()} == {"1", "2"}
    assert seen == {key: {str(version)} for key, version in over_rest.items()}


@pytest.mark.e2e
def test_mlservers_own_client_gets_every_row_right(
    addresses: tuple[str, str], tmp_path: Path
) -> None:
    python = os.environ.get("FEDWARD_MLSERVER_PYTHON")
    if python is None:
        pytest.skip("FEDWARD_MLSERVER_PYTHON names a Python that has mlserver")
    inputs = valid_inputs(8)
    given, got = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 4]}
    lines = []
    for number, row in enumerate(np.nan_to_num(inputs, nan=100.0)):
        row[1], row[3] = number % 2, 1 - number % 2
        inputs[number] = row
        body = {"id": str(number), "inputs": [{**tensor, "data": row.tolist()}]}
        lines.append(json.dumps(body))
    lines.append(json.dumps({"id": "wrong", "inputs": [{**tensor, "data": [500, 0, 100, 0]}]}))
    given.write_text("\n".join(lines) + "\n")
    wanted = sigmoid_of(inputs)[:, 0]
    command = [str(Path(python).with_name("mlserver")), "infer", "-u", addresses[0], "-m", "tiny"]

    def infer(*options: str) -> dict[str, dict[str, Any]]:
        paths = ["-i", str(given), "-o", str(got)]
        done = subprocess.run(
            [*command, *paths, *options], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        entries = [json.loads(line) for line in got.read_text().splitlines()]
        return {str(entry.get("id")): entry for entry in entries}

    for options in (["-s", "1"], ["-s", "1", "-b"], ["-s", "4"], ["-s", "4", "-w", "3", "-b"]):
        found = infer(*options, "-r", "1")
        values = [found[str(number)]["outputs"][0]["data"][0] for number in range(8)]
        np.testing.assert_allclose(values, wanted, atol=1e-6)
        (refused,) = (entry["error"] for entry in found.values() if "error" in entry)
        assert "18 to 120" in refused["msg"]


@pytest.mark.e2e
@pytest.mark.parametrize("client", ["tritonclient", "kserve"])
def test_an_unmodified_client_gets_every_call_right(
    addresses: tuple[str, str], client: str
) -> None:
    python = os.environ.get("FEDWARD_CLIENTS_PYTHON")
    if python is None and importlib.util.find_spec(client) is None:
        pytest.skip(f"needs {client}: FEDWARD_CLIENTS_PYTHON names a Python that has it")
    script = Path(__file__).with_name(f"clients_{client.removesuffix('client')}.py")

    done = subprocess.run(
        [python or sys.executable, str(script), *addresses],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("PASS ")
