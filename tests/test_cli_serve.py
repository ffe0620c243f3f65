"""`fedward serve` is the adapter's own command line."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from release_samples import publish_sample

from fedward.core.identity import Identity
from fedward.serving.store import Store

_PUBLISHER = Identity.generate_publisher()
_COMMAND = (sys.executable, "-m", "fedward.cli", "serve")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = Store(tmp_path / "store")
    store.install(publish_sample(tmp_path / "registry", _PUBLISHER), _PUBLISHER.public)
    return store.folder


def serve(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_store_is_served_on_a_port_with_keys_and_grpc(store: Path, tmp_path: Path) -> None:
    made = serve("keys", "add", "--store", store, "dr-house", "clinician")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    ready = tmp_path / "ready.json"
    options = ("--store", store, "--port", "0", "--grpc-port", "0", "--ready-file", ready)
    process = subprocess.Popen([*_COMMAND, *map(str, options)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        where = json.loads(ready.read_text())
        request = urllib.request.Request(
            f"http://{where['host']}:{where['port']}/predict",
            b'{"age": 63}',
            {"content-type": "application/json", "authorization": f"Bearer {key}"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            reply = json.load(answer)
        request.remove_header("Authorization")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=10)
    finally:
        process.terminate()
        said = process.communicate(timeout=30)[1]

    assert reply["model"] == {"name": "tiny", "version": 1}
    assert "gRPC" in said or "grpc" in said


def test_help_is_the_adapters_and_names_this_command() -> None:
    done = serve("--help")

    assert done.returncode == 0
    assert done.stdout.startswith("usage: fedward serve ")
    assert all(option in done.stdout for option in ("--tls-key", "--grpc-port", "--registry"))


def test_what_is_wrong_ends_as_the_other_commands_do(tmp_path: Path) -> None:
    assert serve("--port", "0").returncode == 2
    assert serve("--store", tmp_path, "--prot", "1").returncode == 2

    nothing = serve("--store", tmp_path / "nowhere", "--port", "0")

    assert nothing.returncode == 1
    assert nothing.stderr.startswith("error: ")


def test_a_decision_of_a_person_goes_through(store: Path, tmp_path: Path) -> None:
    (store / "policy.json").write_text('{"approval": true}')
    held = publish_sample(tmp_path / "registry", _PUBLISHER, bias=-1.0)
    Store(store).install(held, _PUBLISHER.public)

    done = serve("approve", "--store", store, "--by", "Dr House", "tiny", "2")

    assert done.returncode == 0, done.stderr
    assert Store(store).served()["tiny"].version == 2
