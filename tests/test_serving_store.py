"""The hospital's store: what it keeps, what it refuses, and what survives a crash."""

import json
import shutil
from pathlib import Path

import pytest
from release_samples import publish_sample, release_files

from fedward.core.errors import ReleaseRejected, SignatureInvalid
from fedward.core.identity import Identity
from fedward.core.release import write_release
from fedward.serving.store import Served, Store

_IDENTITY = Identity.generate_publisher()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_newest_installed_release_is_served(store: Store, registry: Path) -> None:
    for bias in (-2.0, -1.0):
        store.install(publish_sample(registry, _IDENTITY, bias=bias), _IDENTITY.public)

    assert store.newest().signature.version == 2
    assert store.served() == {"tiny": Served(version=2, previous=1, highest=2)}


def test_what_is_kept_is_what_was_verified(store: Store, registry: Path) -> None:
    release = publish_sample(registry, _IDENTITY)

    store.install(release, _IDENTITY.public)

    assert _files(store.path("tiny", 1)) == _files(release)


def test_installing_what_is_served_changes_nothing(store: Store, registry: Path) -> None:
    release = publish_sample(registry, _IDENTITY)
    store.install(release, _IDENTITY.public)
    before = _files(store.folder)

    store.install(release, _IDENTITY.public)

    assert _files(store.folder) == before


def test_a_refused_release_leaves_nothing_but_its_reason(store: Store, registry: Path) -> None:
    release = publish_sample(registry, _IDENTITY)
    (release / "card.json").write_bytes(b"{}")

    with pytest.raises(SignatureInvalid):
        store.install(release, _IDENTITY.public)

    assert list(_files(store.folder)) == ["refused.jsonl"]
    entry = json.loads((store.folder / "refused.jsonl").read_text())
    assert entry["error"] == "SignatureInvalid"
    assert "card.json" in entry["reason"]


def test_an_older_version_is_not_installed_again(store: Store, registry: Path) -> None:
    first, second = publish_sample(registry, _IDENTITY), publish_sample(registry, _IDENTITY)
    store.install(second, _IDENTITY.public)

    with pytest.raises(ReleaseRejected, match="version 2 was installed before"):
        store.install(first, _IDENTITY.public)

    assert store.newest().signature.version == 2


def test_another_release_under_the_same_version_is_refused(
    store: Store, registry: Path, tmp_path: Path
) -> None:
    store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)
    write_release(tmp_path / "other", release_files(1, bias=0), name="m", identity=_IDENTITY)

    with pytest.raises(ReleaseRejected, match="installed before"):
        store.install(tmp_path / "other", _IDENTITY.public)


def test_another_publisher_is_refused_once_one_is_pinned(store: Store, registry: Path) -> None:
    store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)
    other = Identity.generate_publisher()

    with pytest.raises(SignatureInvalid, match="the store trusts"):
        store.install(publish_sample(registry, other), other.public)


def test_a_stored_file_that_changed_is_not_served(store: Store, registry: Path) -> None:
    store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)
    path = store.path("tiny", 1) / "model.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(SignatureInvalid, match=r"model\.onnx"):
        store.newest()


def test_a_version_moved_to_anothers_place_is_not_served(store: Store, registry: Path) -> None:
    for _ in range(2):
        store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)
    shutil.rmtree(store.path("tiny", 2))
    shutil.copytree(store.path("tiny", 1), store.path("tiny", 2))

    with pytest.raises(ReleaseRejected, match="it holds tiny/1"):
        store.newest()


def test_rolling_back_serves_the_version_before_and_forward_again(
    store: Store, registry: Path
) -> None:
    for _ in range(2):
        store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)

    assert store.roll_back("tiny").version == 1
    assert store.newest().signature.version == 1
    assert store.roll_back("tiny").version == 2


def test_after_a_roll_back_the_next_version_still_installs(store: Store, registry: Path) -> None:
    for _ in range(2):
        store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)
    store.roll_back("tiny")

    store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)

    assert store.served() == {"tiny": Served(version=3, previous=1, highest=3)}


def test_there_is_nothing_to_roll_back_to_at_first(store: Store, registry: Path) -> None:
    store.install(publish_sample(registry, _IDENTITY), _IDENTITY.public)

    with pytest.raises(ReleaseRejected, match="no version to go back to"):
        store.roll_back("tiny")


def test_an_empty_store_says_so(store: Store) -> None:
    with pytest.raises(ReleaseRejected, match="install a release"):
        store.newest()


def test_two_models_live_side_by_side(store: Store, registry: Path) -> None:
    for model in ("tiny", "other"):
        store.install(publish_sample(registry, _IDENTITY, model=model), _IDENTITY.public)

    assert {store.newest(name).signature.model for name in store.served()} == {"tiny", "other"}
    with pytest.raises(ReleaseRejected, match="name one of"):
        store.newest()


def test_half_a_copy_of_a_crash_is_replaced(store: Store, registry: Path) -> None:
    release = publish_sample(registry, _IDENTITY)
    half = store.path("tiny", 1)
    half.mkdir(parents=True)
    (half / "model.onnx").write_bytes(b"half")

    store.install(release, _IDENTITY.public)

    assert _files(half) == _files(release)
