"""Where a hospital's policy asks for it, a release waits for a named person."""

import json
from pathlib import Path

import pytest
from release_samples import publish_sample
from serving_client import ask

from fedward.core.errors import ReleaseRejected
from fedward.core.identity import Identity
from fedward.serving.__main__ import main
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.gate import Gate, add_key, read_keys
from fedward.serving.service import Service
from fedward.serving.store import Store
from fedward.serving.watcher import Watcher

_IDENTITY = Identity.generate_publisher()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.folder.mkdir()
    (store.folder / "policy.json").write_text('{"approval": true}')
    return store


def _install(store: Store, registry: Path) -> Path:
    folder = publish_sample(registry, _IDENTITY)
    store.install(folder, _IDENTITY.public)
    return folder


def test_what_is_installed_waits_and_approved_it_serves(store: Store, tmp_path: Path) -> None:
    _install(store, tmp_path / "registry")
    assert store.served() == {}

    store.decide("tiny", 1, by="Dr Lee", approve=True)

    assert store.newest().signature.version == 1
    decision = json.loads((store.folder / "approvals.jsonl").read_text())
    assert (decision["by"], decision["approved"], decision["version"]) == ("Dr Lee", True, 1)


def test_installing_what_waits_changes_nothing(store: Store, tmp_path: Path) -> None:
    folder = _install(store, tmp_path / "registry")

    store.install(folder, _IDENTITY.public)

    assert store.served() == {}
    store.decide("tiny", 1, by="Dr Lee", approve=True)
    store.install(folder, _IDENTITY.public)
    assert store.newest().signature.version == 1


def test_a_newer_release_takes_the_waiting_place(store: Store, tmp_path: Path) -> None:
    for _ in range(2):
        _install(store, tmp_path / "registry")

    with pytest.raises(ReleaseRejected, match="does not wait"):
        store.decide("tiny", 1, by="Dr Lee", approve=True)
    store.decide("tiny", 2, by="Dr Lee", approve=True)
    assert store.newest().signature.version == 2


def test_what_was_declined_is_not_installed_again(store: Store, tmp_path: Path) -> None:
    folder = _install(store, tmp_path / "registry")
    store.decide("tiny", 1, by="Dr Lee", approve=False)

    with pytest.raises(ReleaseRejected, match="declined"):
        store.install(folder, _IDENTITY.public)
    with pytest.raises(ReleaseRejected, match="does not wait"):
        store.decide("tiny", 1, by="Dr Lee", approve=True)
    assert store.served() == {}


def test_an_approval_needs_a_name(store: Store, tmp_path: Path) -> None:
    _install(store, tmp_path / "registry")

    with pytest.raises(ValueError, match="name"):
        store.decide("tiny", 1, by=" ", approve=True)


def test_what_changed_while_it_waited_is_not_served(store: Store, tmp_path: Path) -> None:
    _install(store, tmp_path / "registry")
    (store.path("tiny", 1) / "card.json").write_bytes(b"{}")

    assert main(["approve", "--store", str(store.folder), "--by", "Dr Lee", "tiny", "1"]) == 1
    assert store.served() == {}


@pytest.mark.parametrize("policy", ["", "{}", '{"approval": "yes"}', "[]"])
def test_a_policy_that_cannot_be_read_lets_nothing_in(
    store: Store, tmp_path: Path, policy: str
) -> None:
    (store.folder / "policy.json").write_text(policy)

    with pytest.raises(ReleaseRejected, match=r"policy\.json"):
        _install(store, tmp_path / "registry")
    assert store.served() == {}


def test_an_operator_approves_over_the_network_in_their_own_name(
    store: Store, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    operator = {"X-API-Key": add_key(keys, name="Kim", role="operator")}
    clinician = {"X-API-Key": add_key(keys, name="ward", role="clinician")}
    catalogue = Catalogue([])
    service = Service(catalogue, Gate(read_keys(keys)), store=store)
    app, path = App(service), "/manage/models/tiny/approve"
    watcher = Watcher(store, catalogue, service.told)
    _install(store, tmp_path / "registry")
    watcher.look()
    assert ask(app, "GET", "/status", headers=operator).json["waiting"] == {"tiny": 1}

    refused = [
        ask(app, "POST", path, {"version": 1}, clinician).status,
        ask(app, "POST", path, {"version": "1"}, operator).status,
        ask(app, "POST", path, {"version": 2}, operator).status,
    ]
    approved = ask(app, "POST", path, {"version": 1}, operator)
    watcher.look()

    assert refused == [403, 422, 409]
    assert approved.json == {"model": "tiny", "version": 1, "approved": True}
    assert catalogue.names() == ("tiny",)
    assert "Kim" in (store.folder / "approvals.jsonl").read_text()
