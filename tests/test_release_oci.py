"""A registry copied to an OCI registry, and followed from there; tampering is refused."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from oci_registry import OciRegistry, oci_registry
from release_samples import MODEL, publish_sample
from serving_client import adapter
from studies import write_study
from typer.testing import CliRunner

from fedward.cli import app
from fedward.core.errors import ConfigError, RegistryUnreachable, ReleaseRejected, SignatureInvalid
from fedward.core.files import write_atomic
from fedward.core.identity import Identity
from fedward.core.oci import OciAddress, pull_files, push_files
from fedward.server.oci import push_registry
from fedward.server.updates import found_registry, refresh_registry
from fedward.serving.follower import NOT_YET, Follower
from fedward.serving.store import Store
from fedward.serving.updates import Updates, follow
from fedward.simulations.simulate import prepare_run, simulate

pytest.importorskip("oras")

_PUBLISHER = Identity.generate_publisher()
_ONE_LAYER = b'{"layers": [{"annotations": {"org.opencontainers.image.title": "a"}, %s}]}'
_ROOTS = [Identity.generate_publisher() for _ in range(3)]


@pytest.fixture
def remote() -> Iterator[OciRegistry]:
    with oci_registry() as registry:
        yield registry


@pytest.fixture
def address(remote: OciRegistry) -> str:
    return f"oci://{remote.host}/hospitals/releases"


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    folder = tmp_path / "registry"
    publish_sample(folder, _PUBLISHER)
    found_registry(folder, roots=_ROOTS, threshold=2, publisher=_PUBLISHER)
    return folder


@pytest.fixture
def updates(tmp_path: Path, registry: Path, address: str) -> Updates:
    store = Store(tmp_path / "store")
    write_atomic(store.folder / "trusted.pem", _PUBLISHER.public.pem())
    push_registry(registry, address)
    return follow(store, address, (registry / "tuf" / "1.root.json").read_bytes())


def _served(updates: Updates) -> int:
    return updates.store.newest().signature.version


# --- files -------------------------------------------------------------------------------------


def test_files_come_back_as_they_went(address: str) -> None:
    files = {"a.json": b"{}", "variants/int8.onnx": bytes(range(256)) * 9, "empty": b""}
    where = OciAddress.parse(address)

    push_files(where, "1", files)

    assert pull_files(where, "1", limit_of=lambda _: 10_000) == files
    assert pull_files(where, "2", limit_of=lambda _: 10_000) is None


def test_what_is_too_large_is_not_fetched(remote: OciRegistry, address: str) -> None:
    where = OciAddress.parse(address)
    push_files(where, "1", {"a.json": bytes(5000)})
    remote.asked.clear()

    with pytest.raises(RegistryUnreachable, match="limit is 4999"):
        pull_files(where, "1", limit_of=lambda _: 4999)

    assert not any("blobs" in path for _, path in remote.asked)


def test_a_registry_that_sends_more_or_something_else_is_refused(
    remote: OciRegistry, address: str
) -> None:
    where = OciAddress.parse(address)
    push_files(where, "1", {"a.json": b"what was pushed"})
    digest = "sha256:" + hashlib.sha256(b"what was pushed").hexdigest()

    remote.blobs[digest] = b"what was pushee"
    with pytest.raises(RegistryUnreachable, match="digest"):
        pull_files(where, "1", limit_of=lambda _: 100)
    remote.blobs[digest] = b"what was pushed, and more"
    with pytest.raises(RegistryUnreachable, match="more than 15 bytes"):
        pull_files(where, "1", limit_of=lambda _: 100)


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 5000,
        b'{"layers": 3}',
        b'{"layers": ["a"]}',
        b'{"layers": [{}]}',
        _ONE_LAYER % b'"digest": "x", "size": 1',
        _ONE_LAYER % (b'"digest": "sha256:%s", "size": -1' % (b"0" * 64)),
        b" " * 2_000_000,
    ],
)
def test_a_manifest_that_is_malformed_is_refused(
    remote: OciRegistry, address: str, manifest: bytes
) -> None:
    remote.manifests["hospitals/releases", "1"] = manifest

    with pytest.raises(RegistryUnreachable):
        pull_files(OciAddress.parse(address), "1", limit_of=lambda _: 100)


@pytest.mark.parametrize(
    "text",
    ["oci://", "oci://host", "https://host/x", "oci://host/UPPER", "oci://ho st/x", "folder"],
)
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="oci://"):
        OciAddress.parse(text)


def test_only_this_machine_is_asked_without_tls() -> None:
    assert OciAddress.parse("oci://127.0.0.1:5000/x").loopback
    assert OciAddress.parse("oci://localhost:5000/x").loopback
    assert not OciAddress.parse("oci://registry.example/x").loopback
    assert not OciAddress.parse("oci://localhost.example:80/x").loopback


# --- a registry --------------------------------------------------------------------------------


def test_a_hospital_follows_an_oci_registry(
    registry: Path, address: str, updates: Updates, remote: OciRegistry
) -> None:
    assert updates.look() is None
    assert _served(updates) == 1

    publish_sample(registry, _PUBLISHER, bias=-1.0)
    refresh_registry(registry, publisher=_PUBLISHER)
    assert push_registry(registry, address) == [f"{MODEL}/2"]
    assert push_registry(registry, address) == []
    assert updates.look() is None
    assert _served(updates) == 2
    remote.asked.clear()
    assert updates.look() is None
    # What is installed is not fetched again: the metadata alone are.
    assert not any(MODEL in path for _, path in remote.asked)


def test_a_registry_that_is_silent_is_stale_and_goes_on_serving(
    updates: Updates, remote: OciRegistry
) -> None:
    updates.look()
    remote.silent = True

    assert "503" in str(updates.look())
    assert _served(updates) == 1


def test_a_registry_that_is_gone_is_stale(tmp_path: Path, registry: Path) -> None:
    with oci_registry() as remote:
        address = f"oci://{remote.host}/x"
        push_registry(registry, address)
    store = Store(tmp_path / "store")
    root = (registry / "tuf" / "1.root.json").read_bytes()

    assert "cannot be reached" in str(follow(store, address, root).look())


def test_a_registry_that_goes_back_is_refused(
    registry: Path, address: str, updates: Updates, remote: OciRegistry
) -> None:
    old = remote.manifests["hospitals/releases", "tuf"]
    publish_sample(registry, _PUBLISHER, bias=-1.0)
    refresh_registry(registry, publisher=_PUBLISHER)
    push_registry(registry, address)
    updates.look()

    remote.manifests["hospitals/releases", "tuf"] = old

    with pytest.raises(ReleaseRejected, match="do not verify"):
        updates.look()
    assert _served(updates) == 2


def test_another_release_under_the_same_tag_is_refused_and_does_not_stick(
    tmp_path: Path, updates: Updates, remote: OciRegistry
) -> None:
    publish_sample(tmp_path / "other", _PUBLISHER, bias=0.5)
    with oci_registry() as elsewhere:
        push_registry(tmp_path / "other", f"oci://{elsewhere.host}/hospitals/releases")
        name = f"hospitals/releases/{MODEL}"
        right = remote.manifests[name, "1"]
        remote.blobs |= elsewhere.blobs
        remote.manifests[name, "1"] = elsewhere.manifests[name, "1"]

    with pytest.raises(ReleaseRejected, match="vouches"):
        updates.look()
    assert updates.store.served() == {}
    remote.manifests[name, "1"] = right
    assert updates.look() is None
    assert _served(updates) == 1


def test_a_path_that_leaves_the_release_is_refused(
    tmp_path: Path, updates: Updates, remote: OciRegistry
) -> None:
    name = f"hospitals/releases/{MODEL}"
    manifest = json.loads(remote.manifests[name, "1"])
    manifest["layers"][0]["annotations"]["org.opencontainers.image.title"] = "../../escape.json"
    remote.manifests[name, "1"] = json.dumps(manifest).encode()

    assert "leaves the release" in str(updates.look())
    assert not list(tmp_path.rglob("escape.json"))


def test_a_changed_file_of_a_release_is_refused_with_its_name(
    updates: Updates, remote: OciRegistry
) -> None:
    """The registry may lie about digests consistently; the publisher's signature does not."""
    name = f"hospitals/releases/{MODEL}"
    manifest = json.loads(remote.manifests[name, "1"])
    (layer,) = (
        one
        for one in manifest["layers"]
        if one["annotations"]["org.opencontainers.image.title"] == "card.json"
    )
    content = b'{"another": "card"}'
    layer["size"], layer["digest"] = len(content), "sha256:" + hashlib.sha256(content).hexdigest()
    remote.blobs[layer["digest"]] = content
    remote.manifests[name, "1"] = json.dumps(manifest).encode()

    with pytest.raises(SignatureInvalid, match=r"card\.json"):
        updates.look()


def test_a_version_is_never_pushed_over_another(
    registry: Path, address: str, updates: Updates
) -> None:
    shutil.rmtree(registry / MODEL)
    publish_sample(registry, _PUBLISHER, bias=0.5)

    with pytest.raises(ConfigError, match="never used again"):
        push_registry(registry, address)
    assert updates.look() is None


# --- from the outside --------------------------------------------------------------------------


def test_the_command_line_pushes(registry: Path, address: str) -> None:
    done = CliRunner().invoke(app, ["registry", "push", str(registry), address, "--json"])

    assert done.exit_code == 0
    assert json.loads(done.stdout)["releases"] == [f"{MODEL}/1"]


def test_a_run_copies_what_it_publishes_and_one_that_cannot_goes_on(
    tmp_path: Path, address: str, remote: OciRegistry
) -> None:
    extra = f'\n[publish]\nmirror = "{address}"\n'
    file = write_study(tmp_path, rounds=2, extra=extra)

    run = prepare_run(file, tmp_path / "run")
    simulate(file, run)
    remote.silent = True
    again = prepare_run(file, tmp_path / "again")
    simulate(file, again)

    assert ("hospitals/releases/heart", "1") in remote.manifests
    assert any(event["event"] == "registry mirrored" for event in run.events())
    (said,) = (e for e in again.events() if e["event"] == "registry not mirrored")
    assert "503" in said["reason"]
    assert (again.path / "metrics.json").exists()


def test_without_oras_the_error_says_what_to_install(registry: Path, address: str) -> None:
    code = (
        "import sys; sys.modules['oras'] = None\n"
        "from fedward.cli import main\n"
        f"sys.argv = ['fedward', 'registry', 'push', {str(registry)!r}, {address!r}]\n"
        "main()"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "pip install 'fedward[oci]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.e2e
def test_an_adapter_follows_an_oci_registry(
    tmp_path: Path, registry: Path, address: str, updates: Updates
) -> None:
    root = str(registry / "tuf" / "1.root.json")
    options = ("--registry", address, "--root", root, "--fetch-every", "0.1")

    with adapter(updates.store.folder, tmp_path / "ready", *options):
        assert _served(updates) == 1


@pytest.mark.e2e
def test_no_swap_waits_for_a_registry_that_hangs(
    tmp_path: Path, registry: Path, address: str, updates: Updates, remote: OciRegistry
) -> None:
    updates.look()
    store, root = updates.store, str(registry / "tuf" / "1.root.json")
    options = ("--registry", address, "--root", root, "--fetch-every", "0.1")
    newer = publish_sample(registry, _PUBLISHER, bias=-1.0)
    remote.hanging = True

    start = time.monotonic()
    with adapter(store.folder, tmp_path / "ready", *options) as (url, process):
        ready = time.monotonic() - start
        first = httpx.post(f"{url}/predict", json={"age": 63}).json()
        start = time.monotonic()
        store.install(newer, _PUBLISHER.public)
        while httpx.get(f"{url}/v2/models/{MODEL}").json()["versions"] != ["2"]:
            assert time.monotonic() < start + 5
            time.sleep(0.02)
        start = time.monotonic()
        process.terminate()
        process.wait(20)
        stopped = time.monotonic() - start

    assert ready < 15  # a registry may be silent for 30 s
    assert "not answered" in first["stale"]
    assert stopped < 5


def test_a_follower_says_why_it_could_not_ask_and_asks_again() -> None:
    said: list[str | None] = []
    answers: Iterator[str | None] = iter(["stale", None])

    def asked() -> str | None:
        for answer in answers:
            return answer
        raise OSError("the disk is full")

    follower = Follower(asked, said.append, every=0.001)
    follower.start(patience=10)
    deadline = time.monotonic() + 10
    while len(said) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    follower.stop()

    assert said[:3] == [NOT_YET, "stale", None]
    assert "the disk is full" in str(said[3])
    assert "the disk is full" in str(said[4])
