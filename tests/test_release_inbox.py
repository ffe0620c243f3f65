"""How a release gets from the wire into service."""

from pathlib import Path

import pytest
from release_samples import publish_sample

from fedward.core.errors import FedwardError, ReleaseRejected, SignatureInvalid
from fedward.core.identity import Identity
from fedward.core.inbox import receive_release, waiting
from fedward.serving.inbox import install_inbox
from fedward.serving.store import Store

PUBLISHER, STRANGER = Identity.generate_publisher(), Identity.generate_publisher()


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_was_received_is_served(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for _ in range(2):
        files = files_of(publish_sample(tmp_path / "registry", PUBLISHER))
        receive_release(files, store=store, trusted=PUBLISHER.public)

    installed = install_inbox(Store(store))

    assert len(installed) == 2
    assert waiting(store) == []
    assert Store(store).served()["tiny"].version == 2


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda f: f | {"card.json": b"{}"}, SignatureInvalid),
        (lambda f: f | {"extra.txt": b"x"}, ReleaseRejected),
        (lambda f: f | {"../outside": b"x"}, ReleaseRejected),
        (lambda f: f | {"/etc/outside": b"x"}, ReleaseRejected),
        (lambda f: f | {f"{number}.txt": b"" for number in range(99)}, ReleaseRejected),
        (lambda f: {k: v for k, v in f.items() if k != "model.onnx"}, FedwardError),
        (lambda _: {}, FedwardError),
    ],
)
def test_what_is_not_the_publishers_leaves_nothing_behind(
    tmp_path: Path, spoil: object, error: type[FedwardError]
) -> None:
    assert callable(spoil)
    files = spoil(files_of(publish_sample(tmp_path / "registry", PUBLISHER)))

    with pytest.raises(error):
        receive_release(files, store=tmp_path / "store", trusted=PUBLISHER.public)

    assert waiting(tmp_path / "store") == []
    assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == []
    assert not (tmp_path / "outside").exists()


def test_a_stranger_cannot_publish(tmp_path: Path) -> None:
    files = files_of(publish_sample(tmp_path / "registry", STRANGER))

    with pytest.raises(SignatureInvalid):
        receive_release(files, store=tmp_path / "store", trusted=PUBLISHER.public)


def test_what_changes_in_the_inbox_is_refused_and_the_old_version_serves(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = files_of(publish_sample(tmp_path / "registry", PUBLISHER))
    receive_release(first, store=store, trusted=PUBLISHER.public)
    install_inbox(Store(store))
    second = files_of(publish_sample(tmp_path / "registry", PUBLISHER))
    receive_release(second, store=store, trusted=PUBLISHER.public)
    (waiting(store)[0] / "model.onnx").write_bytes(b"changed")

    installed = install_inbox(Store(store))

    assert installed == []
    assert Store(store).served()["tiny"].version == 1
    assert "model.onnx" in (store / "refused.jsonl").read_text()
