"""The adapter as a process: starts, says where, answers, stops, and never loads torch."""

import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from release_samples import publish_sample, sigmoid_of, valid_inputs
from serving_client import adapter

from fedward.core.identity import Identity
from fedward.serving.store import Store

_IDENTITY = Identity.generate_publisher()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.install(publish_sample(tmp_path / "registry", _IDENTITY), _IDENTITY.public)
    return store


def test_a_store_is_served_over_http_until_it_is_stopped(store: Store, tmp_path: Path) -> None:
    inputs = valid_inputs(3)
    tensor = {"name": "input", "datatype": "FP64", "shape": [3, 4]}
    data = [None if np.isnan(value) else value for value in inputs.ravel().tolist()]

    with adapter(store.folder, tmp_path / "ready.json") as (address, process):
        ready = httpx.get(f"{address}/v2/health/ready")
        answer = httpx.post(
            f"{address}/v2/models/tiny/infer", json={"inputs": [{**tensor, "data": data}]}
        )
        patient = httpx.post(f"{address}/predict", json={"age": 63, "sex": "male"})
        process.terminate()
        said = process.communicate(timeout=30)[1]

    assert ready.json() == {"ready": True, "live": True}
    assert answer.json()["outputs"][0]["data"] == pytest.approx(
        sigmoid_of(inputs)[:, 0].tolist(), abs=1e-6
    )
    assert patient.json()["missing"] == ["cholesterol", "smoker"]
    assert said.startswith("ready at http://127.0.0.1:")


def test_what_does_not_verify_is_not_served(store: Store) -> None:
    (store.path("tiny", 1) / "card.json").write_bytes(b"{}")
    command = [sys.executable, "-m", "fedward.serving", "--store", str(store.folder)]

    done = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 1
    assert "card.json" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_adapter_imports_no_torch_nor_anything_of_training() -> None:
    script = (
        "import sys, fedward.serving.server, fedward.serving.__main__\n"
        "heavy = {'torch', 'opacus', 'flwr', 'sklearn', 'scipy', 'onnx', 'pydantic', 'ray'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"
