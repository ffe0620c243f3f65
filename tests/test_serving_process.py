"""The adapter as a process: starts, says where, answers, stops, and never loads torch."""

import datetime
import ipaddress
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from release_samples import publish_sample, sigmoid_of, valid_inputs
from serving_client import adapter

from fedward.core.identity import Identity
from fedward.server.updates import found_registry, refresh_registry
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


def test_a_followed_registry_is_served_and_a_silent_one_is_called_stale(
    store: Store, tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    root = found_registry(registry, roots=[_IDENTITY], threshold=1, publisher=_IDENTITY)
    follow = ("--registry", str(registry), "--root", str(root), "--fetch-every", "0.05")
    with adapter(store.folder, tmp_path / "ready.json", *follow) as (address, _):
        publish_sample(registry, _IDENTITY, bias=-1.0)
        refresh_registry(registry, publisher=_IDENTITY)
        _until(lambda: httpx.get(f"{address}/v2/models/tiny").json()["versions"] == ["2"])
        fresh = httpx.post(f"{address}/predict", json={"age": 63}).json()
        refresh_registry(registry, publisher=_IDENTITY, valid_days=-1)
        _until(lambda: "fedward_stale 1" in httpx.get(f"{address}/metrics").text)
        stale = httpx.post(f"{address}/predict", json={"age": 63}).json()

    assert "stale" not in fresh
    assert "run out" in stale["stale"]
    assert stale["probability"] == fresh["probability"]


def test_the_adapter_speaks_tls(store: Store, tmp_path: Path) -> None:
    certificate, key = _self_signed(tmp_path)
    options = ("--tls-certificate", str(certificate), "--tls-key", str(key))
    context = ssl.create_default_context(cafile=str(certificate))

    with adapter(store.folder, tmp_path / "ready.json", *options) as (address, _):
        url = address.replace("http:", "https:")
        answer = httpx.get(f"{url}/v2/health/ready", verify=context)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{address}/v2/health/ready")

    assert answer.json()["ready"] is True


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _self_signed(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "adapter")])
    now = datetime.datetime.now(tz=datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "tls.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "tls.key").write_bytes(pem)
    return folder / "tls.pem", folder / "tls.key"
