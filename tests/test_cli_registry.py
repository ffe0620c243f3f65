"""`fedward registry`: what was published, and its root of trust."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from release_samples import publish_sample

from fedward.core.files import write_atomic
from fedward.core.identity import Identity
from fedward.serving.store import Store
from fedward.serving.updates import Updates

_PUBLISHER = Identity.generate_publisher()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for _ in range(2):
        publish_sample(tmp_path / "registry", _PUBLISHER)
    _PUBLISHER.save(tmp_path / "publisher.pem")
    return tmp_path


def registry(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedward.cli", "registry", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        timeout=60,
    )


def test_a_registry_lists_versions_dates_and_promises(folder: Path) -> None:
    value = json.loads(registry(folder, "list", "registry", "--json").stdout)
    shown = registry(folder, "list", "registry").stdout

    assert [(r["model"], r["version"]) for r in value["releases"]] == [("tiny", 1), ("tiny", 2)]
    assert all(r["privacy"].startswith("Differentially private") for r in value["releases"])
    assert all(r["date"].endswith("Z") for r in value["releases"])
    assert not value["founded"]
    assert "tiny" in shown
    assert "no root of trust" in shown


def test_a_broken_release_is_listed_without_a_promise(folder: Path) -> None:
    (folder / "registry/tiny/2/privacy.json").write_text('{"statement": 7')
    (folder / "registry/tiny/1/privacy.json").write_text('{"statement": "a\\u001b[2Jb"}')

    value = json.loads(registry(folder, "list", "registry", "--json").stdout)

    assert [r["privacy"] for r in value["releases"]] == ["a[2Jb", None]


def test_a_registry_is_founded_followed_and_refreshed(folder: Path) -> None:
    keys = [word for name in "abc" for word in ("--root", f"{name}.pem")]
    done = registry(folder, "found", "registry", "--publisher", "publisher.pem", *keys, "--json")
    assert done.returncode == 0, done.stderr
    store = Store(folder / "store")
    write_atomic(store.folder / "trusted.pem", _PUBLISHER.public.pem())
    root = folder / json.loads(done.stdout)["root"]
    follower = Updates(store, folder / "registry", root.read_bytes())

    assert follower.look() is None
    assert store.served()["tiny"].version == 2
    assert json.loads(done.stdout)["threshold"] == 2
    assert (folder / "a.pem").stat().st_mode & 0o077 == 0

    publish_sample(folder / "registry", _PUBLISHER)
    assert registry(folder, "refresh", "registry", "--publisher", "publisher.pem").returncode == 0
    assert follower.look() is None
    assert store.served()["tiny"].version == 3


def test_a_registry_is_founded_once_and_signed_by_its_publisher_only(folder: Path) -> None:
    words = ("registry", "--publisher", "publisher.pem")
    assert registry(folder, "refresh", *words).returncode == 1
    assert registry(folder, "found", *words, "--root", "a.pem", "--threshold", "2").returncode == 2
    assert registry(folder, "found", *words, "--root", "a.pem").returncode == 0

    again = registry(folder, "found", *words, "--root", "a.pem")
    stranger = registry(folder, "refresh", "registry", "--publisher", "a.pem")

    assert again.returncode == 2
    assert stranger.returncode == 1
    assert "another publisher" in stranger.stderr
