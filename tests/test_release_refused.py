"""Every way in which a release can be wrong is refused, in time, and with the reason."""

import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from release_samples import publish_sample, release_files, sigmoid_of

from fedward.core import release as release_module
from fedward.core.canonical import digest
from fedward.core.errors import FedwardError, ReleaseRejected, SignatureInvalid
from fedward.core.identity import Identity
from fedward.core.modelsigning import sign_digests
from fedward.core.release import OPTIONAL, REQUIRED, read_release, write_release, write_verified
from fedward.serving.store import Store

_SECONDS = 0.02
_IDENTITY = Identity.generate_publisher()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish_sample(tmp_path / "registry", _IDENTITY)


def _refusal(folder: Path, *, trusted: Identity = _IDENTITY) -> FedwardError:
    """Why a release is refused; the median of three times must be within the bar."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises((ReleaseRejected, SignatureInvalid)) as caught:
            read_release(folder, trusted.public)
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[1] < _SECONDS
    assert isinstance(caught.value, FedwardError)
    return caught.value


def _signed(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder that a publisher signed, whatever is in it."""
    digests = {path: digest(content) for path, content in files.items()}
    write_verified(folder, files, sign_digests(digests, name="m", identity=_IDENTITY))
    return folder


def test_a_good_release_is_read(folder: Path) -> None:
    release = read_release(folder, _IDENTITY.public)

    assert release.label == "tiny/1"
    np.testing.assert_array_equal(release.golden_outputs, sigmoid_of(release.golden_inputs))


_ALL = sorted({*REQUIRED, *OPTIONAL, "variants/int8.onnx", "variants/fp16.onnx", "model.sig"})


@pytest.mark.parametrize("path", _ALL)
def test_a_flipped_bit_in_any_file_is_refused(tmp_path: Path, path: str) -> None:
    files = release_files()
    files |= {name: b'{"of": "any content"}' for name in _ALL if name not in files}
    del files["model.sig"]
    folder = tmp_path / "release"
    write_release(folder, files, name="m", identity=_IDENTITY)
    content = bytearray((folder / path).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / path).write_bytes(content)

    error = _refusal(folder)

    assert isinstance(error, SignatureInvalid)
    assert path in str(error) or "signature does not verify" in str(error)


def test_every_bit_of_the_weights_is_covered(folder: Path) -> None:
    original = (folder / "model.safetensors").read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1 << (position % 8)
        (folder / "model.safetensors").write_bytes(changed)
        with pytest.raises(SignatureInvalid):
            read_release(folder, _IDENTITY.public)


def test_a_wrong_key_is_refused(folder: Path) -> None:
    assert "another key" in str(_refusal(folder, trusted=Identity.generate_publisher()))


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "card.json").unlink()

    assert "lacks card.json" in str(_refusal(folder))


def test_a_missing_signature_is_refused(folder: Path) -> None:
    (folder / "model.sig").unlink()

    assert "lacks model.sig" in str(_refusal(folder))


@pytest.mark.parametrize("name", ["extra.json", ".hidden", "monitor.json", "model.pkl"])
def test_an_extra_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{}")

    assert repr(name) in str(_refusal(folder))


def test_an_extra_folder_is_refused(folder: Path) -> None:
    (folder / "code").mkdir()

    assert "'code'" in str(_refusal(folder))


def test_a_link_in_place_of_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "card.json", tmp_path / "card.json")
    (folder / "card.json").symlink_to(tmp_path / "card.json")

    assert "link" in str(_refusal(folder))


def test_a_link_in_place_of_the_signature_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "model.sig", tmp_path / "model.sig")
    (folder / "model.sig").symlink_to(tmp_path / "model.sig")

    assert "link" in str(_refusal(folder))


def test_a_link_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)

    assert "is not a folder" in str(_refusal(tmp_path / "link"))


def test_a_pipe_is_refused_without_waiting(folder: Path) -> None:
    (folder / "card.json").unlink()
    os.mkfifo(folder / "card.json")

    assert "not a regular file" in str(_refusal(folder))


@pytest.mark.parametrize("path", ["../escape.json", "/etc/passwd", "variants/../../x.onnx", "a\0b"])
def test_a_signed_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    files = release_files()
    digests = {name: digest(content) for name, content in files.items()}
    bundle = sign_digests({**digests, path: "0" * 64}, name="m", identity=_IDENTITY)
    write_verified(tmp_path / "release", files, bundle)

    assert "may not hold" in str(_refusal(tmp_path / "release"))


def test_an_oversized_file_is_refused_unread(folder: Path) -> None:
    with (folder / "card.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: no disk holds it

    assert "limit" in str(_refusal(folder))


def test_a_signed_pickle_is_refused_by_its_name(tmp_path: Path) -> None:
    files = {**release_files(), "model.pkl": b"\x80\x04."}

    assert "'model.pkl'" in str(_refusal(_signed(tmp_path / "release", files)))


def test_a_signed_pickle_under_another_name_is_refused(tmp_path: Path) -> None:
    files = {**release_files(), "model.safetensors": b"\x80\x04\x95" + bytes(64)}

    assert "not a safetensors file" in str(_refusal(_signed(tmp_path / "release", files)))


def _npz_of_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, inputs=np.array([{}], dtype=object), outputs=np.zeros((1, 1), np.float32))
    return buffer.getvalue()


def _compressed_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, inputs=np.zeros((9, 9)), outputs=np.zeros((9, 1)))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make", [_npz_of_objects, _compressed_npz, lambda: b"", lambda: b"PK\x05\x06" + bytes(18)]
)
def test_golden_values_are_never_unpickled_or_inflated(
    tmp_path: Path, make: Callable[[], bytes]
) -> None:
    files = {**release_files(), "golden.npz": make()}

    assert "golden.npz" in str(_refusal(_signed(tmp_path / "release", files)))


def test_golden_values_are_plain_arrays(folder: Path) -> None:
    with zipfile.ZipFile(folder / "golden.npz") as archive:
        assert sorted(archive.namelist()) == ["inputs.npy", "outputs.npy"]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("signature.json", b"[]"),
        ("signature.json", b"{" * 5000),
        ("signature.json", b'{"format": 2}'),
        ("privacy.json", b"{}"),
        ("card.json", b"not json"),
    ],
)
def test_a_signed_release_that_is_malformed_is_refused(
    tmp_path: Path, path: str, content: bytes
) -> None:
    files = {**release_files(), path: content}

    assert path in str(_refusal(_signed(tmp_path / "release", files))) or "format" in str(
        _refusal(tmp_path / "release")
    )


def test_an_unknown_key_in_the_signature_is_refused(tmp_path: Path) -> None:
    files = release_files()
    value = json.loads(files["signature.json"])
    files["signature.json"] = json.dumps({**value, "script": "x"}).encode()

    assert "script" in str(_refusal(_signed(tmp_path / "release", files)))


def test_a_publisher_cannot_write_a_release_that_would_be_refused(tmp_path: Path) -> None:
    for files in ({}, {**release_files(), "model.pkl": b""}):
        with pytest.raises(ValueError, match="a release"):
            write_release(tmp_path / "r", files, name="m", identity=_IDENTITY)
        assert not (tmp_path / "r").exists()


def test_a_model_that_answers_otherwise_than_trained_is_refused(tmp_path: Path) -> None:
    _signed(tmp_path / "release", release_files(golden_bias=-1.9))

    with pytest.raises(ReleaseRejected, match="golden"):
        Store(tmp_path / "store").install(tmp_path / "release", _IDENTITY.public)


def test_a_model_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    _signed(tmp_path / "release", {**release_files(), "model.onnx": b"\x80\x04."})

    with pytest.raises(ReleaseRejected, match=r"model\.onnx does not run"):
        Store(tmp_path / "store").install(tmp_path / "release", _IDENTITY.public)


def test_limits_are_per_kind_of_file() -> None:
    assert release_module.limit_of("variants/int8.onnx") == release_module.limit_of("model.onnx")
    assert release_module.limit_of("card.json") < release_module.limit_of("model.onnx")
