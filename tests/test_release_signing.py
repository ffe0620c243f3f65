"""The OpenSSF model signature: made, read, and compared with the public implementation."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.core.canonical import digest
from fedward.core.errors import SignatureInvalid
from fedward.core.identity import Identity, PublicIdentity
from fedward.core.modelsigning import sign_digests, verify_bundle

_IDENTITY = Identity.generate_publisher()
_DIGESTS = {
    "model.onnx": digest(b"a"),
    "variants/int8.onnx": digest(b"b"),
    "variants.txt": "0" * 64,
}

# Written by `model_signing sign key` 1.1.1 over the folder of three files that the test names.
_FOREIGN_KEY = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEiDinFmarOGeq5XmJY1lMdVMeH/Xk
eBa31PIv+QE3g7X1umfkZ0hQlK/nrZNvSt7jCMFKWnN6+DJ5TyY/WvNBew==
-----END PUBLIC KEY-----
"""
_FOREIGN_BUNDLE = rb"""{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","verificationMaterial":{"publicKey":{"hint":"24fb086df0cf27d707cc2dd2d90a535cea6d41ebdd47c2b848915aa787014a3b"},"tlogEntries":[]},"dsseEnvelope":{"payload":"ewogICJfdHlwZSI6ICJodHRwczovL2luLXRvdG8uaW8vU3RhdGVtZW50L3YxIiwKICAic3ViamVjdCI6IFsKICAgIHsKICAgICAgIm5hbWUiOiAic2FtcGxlIiwKICAgICAgImRpZ2VzdCI6IHsKICAgICAgICAic2hhMjU2IjogIjBhMTEyNmY3MWZiMjQ3MDZjM2JlYzE4M2M5YmNmZjI5ZjY1ZmQ4NTgxMGUwYWIxN2NhODYwMzQxMjk5MmYyMjUiCiAgICAgIH0KICAgIH0KICBdLAogICJwcmVkaWNhdGVUeXBlIjogImh0dHBzOi8vbW9kZWxfc2lnbmluZy9zaWduYXR1cmUvdjEuMCIsCiAgInByZWRpY2F0ZSI6IHsKICAgICJyZXNvdXJjZXMiOiBbCiAgICAgIHsKICAgICAgICAiYWxnb3JpdGhtIjogInNoYTI1NiIsCiAgICAgICAgImRpZ2VzdCI6ICI4NzQyOGZjNTIyODAzZDMxMDY1ZTdiY2UzY2YwM2ZlNDc1MDk2NjMxZTVlMDdiYmQ3YTBmZGU2MGM0Y2YyNWM3IiwKICAgICAgICAibmFtZSI6ICJhIgogICAgICB9LAogICAgICB7CiAgICAgICAgImFsZ29yaXRobSI6ICJzaGEyNTYiLAogICAgICAgICJkaWdlc3QiOiAiMDI2MzgyOTk4OWI2ZmQ5NTRmNzJiYWFmMmZjNjRiYzJlMmYwMWQ2OTJkNGRlNzI5ODZlYTgwOGY2ZTk5ODEzZiIsCiAgICAgICAgIm5hbWUiOiAidmFyaWFudHMvYiIKICAgICAgfSwKICAgICAgewogICAgICAgICJhbGdvcml0aG0iOiAic2hhMjU2IiwKICAgICAgICAiZGlnZXN0IjogImM4NjVmNmM1YWI4ZDFiMGJjZDM4M2E1ZTFlMzg3OWQyMjY4MWM5NmJmNDYyYzI2OWI3NTgxZDUyM2ZiZTcwYWIiLAogICAgICAgICJuYW1lIjogInZhcmlhbnRzLnR4dCIKICAgICAgfQogICAgXSwKICAgICJzZXJpYWxpemF0aW9uIjogewogICAgICAiaGFzaF90eXBlIjogInNoYTI1NiIsCiAgICAgICJtZXRob2QiOiAiZmlsZXMiLAogICAgICAiYWxsb3dfc3ltbGlua3MiOiBmYWxzZSwKICAgICAgImlnbm9yZV9wYXRocyI6IFsKICAgICAgICAiLmdpdGF0dHJpYnV0ZXMiLAogICAgICAgICIuZ2l0aWdub3JlIiwKICAgICAgICAiLmdpdCIsCiAgICAgICAgIi5naXRodWIiCiAgICAgIF0KICAgIH0KICB9Cn0=","payloadType":"application/vnd.in-toto+json","signatures":[{"sig":"MEQCIEsoHqbi7JtWjBmwlDTFn+p5BVmLJ74O6XGFtcWQG9LbAiArVaRqvFvh1P5E3qXm3HTTA4QsGqyZLhAJb52aC009EA==","keyid":""}]}}"""  # noqa: E501 (as it was written)


def _tool() -> str:
    tool = os.environ.get("FEDWARD_MODEL_SIGNING") or shutil.which("model_signing")
    if tool is None:
        pytest.skip("needs model_signing: pip install model-signing pyopenssl in its own venv")
    return tool


def test_what_was_signed_is_what_verifies() -> None:
    bundle = sign_digests(_DIGESTS, name="m/1", identity=_IDENTITY)

    assert verify_bundle(bundle, _IDENTITY.public) == _DIGESTS


def test_a_bundle_of_the_public_implementation_verifies() -> None:
    trusted = PublicIdentity.from_pem(_FOREIGN_KEY)

    digests = verify_bundle(_FOREIGN_BUNDLE, trusted)

    assert digests == {
        "a": digest(b"a\n"),
        "variants/b": digest(b"b\n"),
        "variants.txt": digest(b"z\n"),
    }


@pytest.mark.e2e
def test_the_public_implementation_verifies_ours_and_refuses_a_changed_file(tmp_path: Path) -> None:
    tool = _tool()
    folder = tmp_path / "model"
    (folder / "variants").mkdir(parents=True)
    contents = {"model.onnx": b"graph", "variants/int8.onnx": b"small", "variants.txt": b"list"}
    for path, content in contents.items():
        (folder / path).write_bytes(content)
    digests = {path: digest(content) for path, content in contents.items()}
    (folder / "model.sig").write_bytes(sign_digests(digests, name="m/1", identity=_IDENTITY))
    (tmp_path / "key.pub").write_bytes(_IDENTITY.public.pem())
    command = [tool, "verify", "key", str(folder), "--signature", str(folder / "model.sig")]
    command += ["--public_key", str(tmp_path / "key.pub")]

    before = subprocess.run(command, capture_output=True, check=False)
    (folder / "variants.txt").write_bytes(b"lisT")
    after = subprocess.run(command, capture_output=True, check=False)

    assert before.returncode == 0, before.stderr
    assert after.returncode != 0


@pytest.mark.e2e
def test_ours_verifies_what_the_public_implementation_signs(tmp_path: Path) -> None:
    tool = _tool()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "x").write_bytes(b"x")
    _IDENTITY.save(tmp_path / "key")
    command = [tool, "sign", "key", str(folder), "--signature", str(tmp_path / "sig")]

    subprocess.run([*command, "--private_key", str(tmp_path / "key")], check=True)

    assert verify_bundle((tmp_path / "sig").read_bytes(), _IDENTITY.public) == {"x": digest(b"x")}


def test_another_key_is_refused() -> None:
    bundle = sign_digests(_DIGESTS, name="m/1", identity=_IDENTITY)

    with pytest.raises(SignatureInvalid, match="another key"):
        verify_bundle(bundle, Identity.generate_publisher().public)


def test_a_forged_hint_does_not_make_another_key_right() -> None:
    other = Identity.generate_publisher()
    bundle = json.loads(sign_digests(_DIGESTS, name="m/1", identity=other))
    hint = json.loads(sign_digests(_DIGESTS, name="m/1", identity=_IDENTITY))
    bundle["verificationMaterial"] = hint["verificationMaterial"]

    with pytest.raises(SignatureInvalid, match="does not verify"):
        verify_bundle(json.dumps(bundle).encode(), _IDENTITY.public)


def test_a_site_identity_cannot_sign_a_release() -> None:
    with pytest.raises(ValueError, match="P-256"):
        sign_digests(_DIGESTS, name="m/1", identity=Identity.generate_site())


def test_a_changed_statement_is_refused() -> None:
    bundle = json.loads(sign_digests(_DIGESTS, name="m/1", identity=_IDENTITY))
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    changed = payload.replace(digest(b"a").encode(), digest(b"c").encode())
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(changed).decode()

    with pytest.raises(SignatureInvalid):
        verify_bundle(json.dumps(bundle).encode(), _IDENTITY.public)


@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_what_is_vouched_for(position: int, bit: int) -> None:
    bundle = bytearray(sign_digests(_DIGESTS, name="m/1", identity=_IDENTITY))
    bundle[position % len(bundle)] ^= 1 << bit

    try:
        vouched = verify_bundle(bytes(bundle), _IDENTITY.public)
    except SignatureInvalid:
        return

    assert vouched == _DIGESTS  # the flip was in a field that nothing relies on, such as keyid


@given(junk=st.binary(max_size=300))
def test_junk_is_refused_and_never_crashes(junk: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        verify_bundle(junk, _IDENTITY.public)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(SignatureInvalid):
        verify_bundle(b"[" * 100_000, _IDENTITY.public)
