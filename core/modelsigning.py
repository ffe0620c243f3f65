"""OpenSSF model signing 1.0 with a P-256 key: a folder's digests in a Sigstore bundle.

The bundle is a DSSE envelope (github.com/secure-systems-lab/dsse) around an in-toto statement
whose predicate lists the SHA-256 of every file; `model_signing verify key` reads what this
writes, and this reads what `model_signing sign key` writes. Nothing here touches a file.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedward.core.canonical import digest
from fedward.core.errors import SignatureInvalid
from fedward.core.identity import Identity, PublicIdentity

BUNDLE_NAME = "model.sig"
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGAIN = "fetch the release again, or ask its publisher"


def sign_digests(digests: Mapping[str, str], *, name: str, identity: Identity) -> bytes:
    """Sign the files of a release.

    Args:
        digests: SHA-256 (64 hexadecimal digits) by path inside the folder, `/` between parts.
        name: What the statement calls the model; informative.
        identity: An ECDSA P-256 identity (`Identity.generate_publisher`).

    Returns:
        The bundle, JSON.

    Raises:
        ValueError: The identity is no P-256 key; OpenSSF model signing takes no other of ours.
    """
    if not isinstance(identity.key, ec.EllipticCurvePrivateKey):
        raise ValueError(  # noqa: TRY004 (the wrong key of a right type)
            "a release is signed with ECDSA P-256: Identity.generate_publisher()"
        )
    ordered = sorted(digests, key=_order)
    statement = {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": root_digest(digests)}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [BUNDLE_NAME],
            },
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digests[path]} for path in ordered
            ],
        },
    }
    payload = json.dumps(statement, indent=2).encode()
    bundle = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": _key_hint(identity.public)},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [
                {"sig": base64.b64encode(identity.sign(_pae(payload))).decode(), "keyid": ""}
            ],
        },
    }
    return json.dumps(bundle).encode()


def verify_bundle(bundle: bytes, trusted: PublicIdentity) -> dict[str, str]:
    """Check a bundle's signature and return the digests that it vouches for.

    The statement is parsed only after the signature over its bytes has verified.

    Returns:
        SHA-256 (64 hexadecimal digits) by path inside the folder.

    Raises:
        SignatureInvalid: The bundle is malformed, signed by another key, or does not verify.
    """
    outer = _object(_load(bundle), "the bundle")
    if outer.get("mediaType") != _MEDIA_TYPE:
        raise SignatureInvalid(f"{BUNDLE_NAME} is no Sigstore bundle v0.3; {_AGAIN}")
    material = _object(outer.get("verificationMaterial"), "verificationMaterial")
    hint = _object(material.get("publicKey"), "publicKey").get("hint")
    if hint != _key_hint(trusted):
        # The hint is not trusted to accept, only to say sooner and clearer why not.
        raise SignatureInvalid(
            f"{BUNDLE_NAME} is signed by another key than the trusted {trusted.fingerprint[:16]}; "
            "check with the publisher which key is theirs"
        )
    envelope = _object(outer.get("dsseEnvelope"), "dsseEnvelope")
    signatures = envelope.get("signatures")
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise SignatureInvalid(f"{BUNDLE_NAME} needs exactly one signature; {_AGAIN}")
    if envelope.get("payloadType") != _PAYLOAD_TYPE:
        raise SignatureInvalid(f"{BUNDLE_NAME} holds no in-toto statement; {_AGAIN}")
    payload = _decode(envelope.get("payload"))
    trusted.verify(_decode(_object(signatures[0], "signature").get("sig")), _pae(payload))
    return _digests_of(_object(_load(payload), "the statement"))


def root_digest(digests: Mapping[str, str]) -> str:
    """One digest for all files: SHA-256 over their digests, in the order of their paths."""
    whole = hashlib.sha256()
    for path in sorted(digests, key=_order):
        whole.update(bytes.fromhex(digests[path]))
    return whole.hexdigest()


def _digests_of(statement: dict[str, Any]) -> dict[str, str]:
    if statement.get("_type") != _STATEMENT_TYPE:
        raise SignatureInvalid(f"{BUNDLE_NAME}: not an in-toto statement v1; {_AGAIN}")
    if statement.get("predicateType") != _PREDICATE_TYPE:
        raise SignatureInvalid(f"{BUNDLE_NAME}: not a model signature v1.0; {_AGAIN}")
    predicate = _object(statement.get("predicate"), "predicate")
    how = _object(predicate.get("serialization"), "serialization")
    if how.get("method") != "files" or how.get("hash_type") != "sha256":
        raise SignatureInvalid(f"{BUNDLE_NAME}: only SHA-256 of whole files is read; {_AGAIN}")
    resources = predicate.get("resources")
    if not isinstance(resources, list):
        raise SignatureInvalid(f"{BUNDLE_NAME}: lists no files; {_AGAIN}")
    digests: dict[str, str] = {}
    for entry in resources:
        resource = _object(entry, "a resource")
        path, value = resource.get("name"), resource.get("digest")
        if (
            not isinstance(path, str)
            or path in digests
            or resource.get("algorithm") != "sha256"
            or not isinstance(value, str)
            or not _SHA256.fullmatch(value)
        ):
            raise SignatureInvalid(f"{BUNDLE_NAME}: a file's entry is malformed; {_AGAIN}")
        digests[path] = value
    subjects = statement.get("subject")
    if not isinstance(subjects, list) or len(subjects) != 1:
        raise SignatureInvalid(f"{BUNDLE_NAME}: needs exactly one subject; {_AGAIN}")
    claimed = _object(_object(subjects[0], "subject").get("digest"), "digest").get("sha256")
    if claimed != root_digest(digests):
        raise SignatureInvalid(f"{BUNDLE_NAME}: its digests do not add up to its own; {_AGAIN}")
    return digests


def _pae(payload: bytes) -> bytes:
    """DSSE 1.0's pre-authentication encoding: what is signed is type and length too."""
    return b"DSSEv1 %d %s %d %s" % (
        len(_PAYLOAD_TYPE),
        _PAYLOAD_TYPE.encode(),
        len(payload),
        payload,
    )


def _key_hint(key: PublicIdentity) -> str:
    return digest(key.pem())


def _order(path: str) -> list[str]:
    # By parts, as model_signing sorts paths: "variants/b" comes before "variants.txt".
    return path.split("/")


def _load(text: bytes) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise SignatureInvalid(f"{BUNDLE_NAME} is not JSON; {_AGAIN}") from None
    return value


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SignatureInvalid(f"{BUNDLE_NAME}: {what} is missing or malformed; {_AGAIN}")
    return value


def _decode(value: object) -> bytes:
    if not isinstance(value, str):
        raise SignatureInvalid(f"{BUNDLE_NAME}: base64 is missing; {_AGAIN}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise SignatureInvalid(f"{BUNDLE_NAME}: not base64; {_AGAIN}") from None
