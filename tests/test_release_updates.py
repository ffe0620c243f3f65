"""The Update Framework: a registry that lies is refused, one that falls silent is stale."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from release_samples import publish_sample
from tuf.api.metadata import Metadata

from fedward.core.errors import ConfigError, FedwardError, ReleaseRejected
from fedward.core.files import write_atomic
from fedward.core.identity import Identity
from fedward.server.updates import found_registry, refresh_registry
from fedward.serving.store import Store
from fedward.serving.updates import Updates

_PUBLISHER = Identity.generate_publisher()
_ROOTS = [Identity.generate_publisher() for _ in range(3)]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    registry = tmp_path / "registry"
    publish_sample(registry, _PUBLISHER)
    found_registry(registry, roots=_ROOTS, threshold=2, publisher=_PUBLISHER)
    return registry


@pytest.fixture
def updates(tmp_path: Path, registry: Path) -> Updates:
    store = Store(tmp_path / "store")
    write_atomic(store.folder / "trusted.pem", _PUBLISHER.public.pem())
    return Updates(store, registry, (registry / "tuf" / "1.root.json").read_bytes())


def _publish(registry: Path, *, bias: float = -1.0) -> Path:
    folder = publish_sample(registry, _PUBLISHER, bias=bias)
    refresh_registry(registry, publisher=_PUBLISHER)
    return folder


def _served(updates: Updates) -> int:
    return updates.store.newest().signature.version


def _refused(updates: Updates) -> FedwardError:
    start = time.perf_counter()
    with pytest.raises(FedwardError) as caught:
        updates.look()
    assert time.perf_counter() - start < 0.5  # the bar of 20 ms is for the median, below
    return caught.value


def test_newer_releases_come_in(registry: Path, updates: Updates) -> None:
    assert updates.look() is None
    assert _served(updates) == 1

    _publish(registry)
    assert updates.look() is None
    assert _served(updates) == 2


def test_looking_twice_changes_nothing(updates: Updates) -> None:
    updates.look()
    before = (updates.store.folder / "serving.json").read_bytes()

    assert updates.look() is None
    assert (updates.store.folder / "serving.json").read_bytes() == before


def test_a_rolled_back_registry_is_refused(
    tmp_path: Path, registry: Path, updates: Updates
) -> None:
    shutil.copytree(registry, tmp_path / "old")
    _publish(registry)
    updates.look()
    shutil.rmtree(registry)
    shutil.copytree(tmp_path / "old", registry)

    assert "do not verify" in str(_refused(updates))
    assert _served(updates) == 2


def test_a_frozen_registry_is_stale_and_goes_on_serving(registry: Path, updates: Updates) -> None:
    updates.look()
    refresh_registry(registry, publisher=_PUBLISHER, valid_days=-1)

    stale = updates.look()

    assert stale is not None
    assert "run out" in stale
    assert _served(updates) == 1


def test_an_unreachable_registry_is_stale_and_goes_on_serving(
    registry: Path, updates: Updates
) -> None:
    updates.look()
    shutil.rmtree(registry)

    assert "cannot be reached" in str(updates.look())
    assert _served(updates) == 1


def test_releases_of_two_states_are_not_mixed(registry: Path, updates: Updates) -> None:
    updates.look()
    second = _publish(registry)
    shutil.rmtree(second)
    publish_sample(registry, _PUBLISHER, bias=0.5)  # signed, but not what the metadata name

    assert "not what the registry vouches for" in str(_refused(updates))
    assert _served(updates) == 1


def test_metadata_of_two_states_are_not_mixed(registry: Path, updates: Updates) -> None:
    old = (registry / "tuf" / "targets.json").read_bytes()
    _publish(registry)
    (registry / "tuf" / "targets.json").write_bytes(old)

    assert isinstance(_refused(updates), ReleaseRejected)


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "targets.json"])
def test_metadata_that_another_key_signed_are_refused(
    registry: Path, updates: Updates, name: str
) -> None:
    from securesystemslib.signer import CryptoSigner

    path = registry / "tuf" / name
    signed: Metadata[Any] = Metadata.from_bytes(path.read_bytes())
    signed.sign(CryptoSigner(Identity.generate_publisher().key))
    path.write_bytes(signed.to_bytes())

    assert isinstance(_refused(updates), ReleaseRejected)
    assert updates.store.served() == {}


def test_a_flipped_bit_in_any_metadata_is_refused(registry: Path, updates: Updates) -> None:
    for path in (registry / "tuf").iterdir():
        original = path.read_bytes()
        changed = bytearray(original)
        changed[original.index(b'"signed"') + 40] ^= 1
        path.write_bytes(changed)
        if path.name != "1.root.json":  # the pinned root is not read again
            assert isinstance(_refused(updates), ReleaseRejected)
        path.write_bytes(original)


def test_a_root_needs_its_threshold_of_keys(registry: Path, tmp_path: Path) -> None:
    from securesystemslib.signer import CryptoSigner

    first: Metadata[Any] = Metadata.from_bytes((registry / "tuf" / "1.root.json").read_bytes())
    first.signed.version = 2
    first.signatures.clear()
    first.sign(CryptoSigner(_ROOTS[0].key))
    (registry / "tuf" / "2.root.json").write_bytes(first.to_bytes())
    store = Store(tmp_path / "store")
    write_atomic(store.folder / "trusted.pem", _PUBLISHER.public.pem())
    updates = Updates(store, registry, (registry / "tuf" / "1.root.json").read_bytes())

    assert isinstance(_refused(updates), ReleaseRejected)
    first.sign(CryptoSigner(_ROOTS[1].key), append=True)
    (registry / "tuf" / "2.root.json").write_bytes(first.to_bytes())
    assert updates.look() is None


def test_a_roll_back_is_refused_within_the_bar(
    tmp_path: Path, registry: Path, updates: Updates
) -> None:
    shutil.copytree(registry / "tuf", tmp_path / "old")
    _publish(registry)
    updates.look()
    shutil.copytree(tmp_path / "old", registry / "tuf", dirs_exist_ok=True)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        with pytest.raises(ReleaseRejected):
            updates.look()
        seconds.append(time.perf_counter() - start)

    assert min(seconds) < 0.02


def test_those_who_refresh_at_once_sign_one_state_after_the_other(
    registry: Path, updates: Updates
) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(refresh_registry, registry, publisher=_PUBLISHER) for _ in range(12)]
        assert [future.result() for future in done] == [None] * 12

    version = Metadata.from_file(str(registry / "tuf" / "timestamp.json")).signed.version
    assert version == 13
    assert updates.look() is None


def test_a_publisher_that_the_root_does_not_name_signs_nothing(registry: Path) -> None:
    before = (registry / "tuf" / "timestamp.json").read_bytes()

    with pytest.raises(ConfigError, match="another publisher"):
        refresh_registry(registry, publisher=_ROOTS[0])

    assert (registry / "tuf" / "timestamp.json").read_bytes() == before


def test_a_threshold_that_cannot_be_met_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threshold"):
        found_registry(tmp_path, roots=_ROOTS, threshold=4, publisher=_PUBLISHER)
