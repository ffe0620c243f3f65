"""Who may ask what."""

import contextlib
import json
from pathlib import Path

import pytest
from release_samples import publish_sample
from serving_client import ask

from fedward.core.errors import ConfigError
from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.gate import Gate, add_key, read_keys, revoke_key
from fedward.serving.problems import Problem
from fedward.serving.routes import ROUTES
from fedward.serving.server import serve
from fedward.serving.service import Service
from fedward.serving.store import Store

_PATIENT = {"age": 63, "sex": "male"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def app(tmp_path: Path, file: Path) -> App:
    identity = Identity.generate_publisher()
    folder = publish_sample(tmp_path / "registry", identity)
    catalogue = Catalogue([start_engine(read_release(folder, identity.public))])
    return App(Service(catalogue, Gate(read_keys(file))))


@pytest.fixture
def keys(file: Path) -> dict[str, str]:
    return {
        "clinician": add_key(file, name="ward 3", role="clinician"),
        "operator": add_key(file, name="it", role="operator"),
        "auditor": add_key(file, name="dpo", role="auditor"),
    }


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_file_holds_no_key(file: Path, keys: dict[str, str]) -> None:
    text = file.read_text()

    assert all(key not in text and key[3:] not in text for key in keys.values())
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("keys")
def test_without_a_key_only_health_and_discovery_are_answered(app: App) -> None:
    for route in ROUTES:
        path = route.path.pattern.replace("\\", "").rstrip("?").rstrip("/")
        if "(" in path:
            continue
        status = ask(app, route.method, path).status
        public = path.startswith("/v2/health") or path == "/cds-services"
        assert public == (route.roles is None), path
        assert status == (200 if public else 401), path
    reply = ask(app, "POST", "/predict", _PATIENT)
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("wrong", ["", "fw_", "x", "fw_" + "A" * 43])
@pytest.mark.usefixtures("keys")
def test_a_wrong_key_is_answered_like_none(app: App, wrong: str) -> None:
    assert ask(app, "POST", "/predict", _PATIENT, _bearer(wrong)).status == 401


def test_a_key_opens_by_either_header(keys: dict[str, str], app: App) -> None:
    key = keys["clinician"]

    assert ask(app, "POST", "/predict", _PATIENT, _bearer(key)).status == 200
    assert ask(app, "POST", "/predict", _PATIENT, {"X-API-Key": key}).status == 200


@pytest.mark.parametrize(
    ("role", "request_", "status"),
    [
        ("operator", "POST /predict", 403),
        ("auditor", "POST /v2/models/tiny/infer", 403),
        ("clinician", "GET /metrics", 403),
        ("auditor", "GET /metrics", 200),
        ("operator", "GET /monitor", 200),
        ("clinician", "POST /manage/models/tiny/roll-back", 403),
        ("auditor", "POST /manage/models/tiny/roll-back", 403),
        ("clinician", "GET /v2/models/tiny", 200),
    ],
)
def test_each_role_may_do_its_own(
    keys: dict[str, str], app: App, role: str, request_: str, status: int
) -> None:
    method, path = request_.split()
    assert ask(app, method, path, _PATIENT, _bearer(keys[role])).status == status


def test_nobody_rolls_back_where_there_are_no_keys(app: App) -> None:
    assert ask(app, "POST", "/manage/models/tiny/roll-back").status == 403


def test_a_revoked_key_opens_nothing(file: Path, keys: dict[str, str]) -> None:
    revoke_key(file, name="ward 3")
    gate = Gate(read_keys(file))

    with pytest.raises(Problem) as caught:
        gate.admit([(b"x-api-key", keys["clinician"].encode())], ())
    assert caught.value.status == 401


@pytest.mark.usefixtures("keys")
def test_a_name_is_given_once(file: Path) -> None:
    with pytest.raises(ValueError, match="taken"):
        add_key(file, name="it", role="clinician")


@pytest.mark.parametrize("text", ["{", "[1]", '[{"name": "x"}]', "[null]"])
def test_a_malformed_file_admits_nobody(file: Path, text: str) -> None:
    file.write_text(text)

    with pytest.raises(ConfigError):
        read_keys(file)


@pytest.mark.usefixtures("keys")
def test_an_unknown_role_in_the_file_is_an_error(file: Path) -> None:
    entries = json.loads(file.read_text())
    entries[0]["role"] = "admin"
    file.write_text(json.dumps(entries))

    with pytest.raises(ConfigError):
        read_keys(file)


def test_one_caller_is_slowed_down_and_the_others_are_not(file: Path, keys: dict[str, str]) -> None:
    now = [0.0]
    gate = Gate(read_keys(file), rate=10, clock=lambda: now[0])

    def admitted(role: str, times: int) -> int:
        count = 0
        for _ in range(times):
            with contextlib.suppress(Problem):
                gate.admit([(b"x-api-key", keys[role].encode())], ())
                count += 1
        return count

    assert admitted("clinician", 100) == 20  # two seconds' worth at once
    assert admitted("operator", 5) == 5
    now[0] = 1.0
    assert admitted("clinician", 100) == 10


def test_an_adapter_without_keys_does_not_listen_to_the_network(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no API key"):
        serve(Store(tmp_path), "0.0.0.0", 0)
