"""Tokens of persons and of record systems: what opens, and above all what does not."""

import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from release_samples import publish_sample
from serving_client import adapter, ask

from fedward.core.errors import ConfigError
from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.gate import Gate, add_key, read_keys
from fedward.serving.keysets import KeySet, read_tokens
from fedward.serving.roles import Caller
from fedward.serving.service import Service
from fedward.serving.store import Store
from fedward.serving.tokens import TokenRefused, Tokens

_NOW = 1_800_000_000.0
_ISSUER, _EHR = "https://id.hospital.example", "https://ehr.hospital.example"
_BASE = "https://adapter.hospital.example:8443"
_RSA = rsa.generate_private_key(65537, 2048)
_OTHER = rsa.generate_private_key(65537, 2048)
_P256, _P384 = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
_PATIENT = {"age": 63, "sex": "male"}


def _public(key: Any, kid: str, **more: str) -> dict[str, Any]:
    kind = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    return {**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig", **more}


_CONFIG: dict[str, Any] = {
    "oidc": [
        {
            "issuer": _ISSUER,
            "audience": "fedward",
            "jwks": "idp.json",
            "algorithms": ["RS256", "ES256"],
            "roles_claim": "realm_access.roles",
            "roles": {"physician": "clinician", "it": "operator"},
            "name_claim": "preferred_username",
        }
    ],
    "cds_clients": [{"issuer": _EHR, "jwks": "ehr.json"}],
    "base_url": _BASE,
}


class _Clock:
    now = _NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def tokens(tmp_path: Path, clock: _Clock) -> Tokens:
    (tmp_path / "tokens.json").write_text(json.dumps(_CONFIG))
    idp = [_public(_RSA, "r1"), _public(_P256, "e1", alg="ES256")]
    (tmp_path / "idp.json").write_text(json.dumps({"keys": idp}))
    (tmp_path / "ehr.json").write_text(
        json.dumps({"keys": [_public(_P384, "c1"), _public(_RSA, "c2")]})
    )
    tokens = read_tokens(tmp_path / "tokens.json", clock=clock)
    assert tokens is not None
    assert tokens.refresh() == []
    return tokens


def _sign(claims: dict[str, Any], key: Any, alg: str, headers: dict[str, Any]) -> bytes:
    # Below `jwt.encode`, which refuses to write what a liar would.
    payload = json.dumps(claims).encode()
    return jwt.api_jws.encode(payload, key, algorithm=alg, headers=headers).encode()


def _person(key: Any = _RSA, alg: str = "RS256", kid: str | None = "r1", **claims: Any) -> bytes:
    whole = {
        "iss": _ISSUER,
        "aud": "fedward",
        "iat": _NOW - 10,
        "exp": _NOW + 600,
        "preferred_username": "dr.house",
        "realm_access": {"roles": ["physician", "volleyball"]},
        **claims,
    }
    said = {name: value for name, value in whole.items() if value is not None}
    headers = {} if kid is None else {"kid": kid}
    return _sign(said, key, alg, headers)


def _call(
    path: str = "/cds-services/tiny",
    *,
    key: Any = _P384,
    alg: str = "ES384",
    kid: str = "c1",
    jti: Any = "n1",
    headers: dict[str, Any] | None = None,
    **claims: Any,
) -> bytes:
    whole = {
        "iss": _EHR, "aud": _BASE + path, "iat": _NOW, "exp": _NOW + 120, "jti": jti, **claims,
    }  # fmt: skip
    said = {name: value for name, value in whole.items() if value is not None}
    return _sign(said, key, alg, {"kid": kid, **(headers or {})})


# --- persons -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "roles"),
    [
        (_person(), {"clinician"}),
        (_person(_P256, "ES256", "e1"), {"clinician"}),
        (_person(aud=["x", "fedward"]), {"clinician"}),
        (_person(realm_access={"roles": ["it", "physician"]}), {"clinician", "operator"}),
        (_person(realm_access={"roles": "it physician"}), {"clinician", "operator"}),
        (_person(realm_access={"roles": ["cook"]}), set()),
        (_person(realm_access=None), set()),
        (_person(realm_access=[{}]), set()),
        (_person(exp=_NOW - 20), {"clinician"}),  # clocks may differ by half a minute
    ],
)
def test_a_person_is_known_by_name_and_roles(tokens: Tokens, token: bytes, roles: set[str]) -> None:
    caller = tokens.verify(token, path="/predict")

    assert caller.name == "oidc:dr.house"
    assert set(caller.roles) == roles


def _unsigned() -> bytes:
    return jwt.encode(
        jwt.decode(_person(), options={"verify_signature": False}), "", "none"
    ).encode()


def _symmetric() -> bytes:
    """RFC 8725, section 2.1: the public key as the secret of an HMAC."""
    import base64
    import hashlib
    import hmac

    pem = _RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"r1","typ":"JWT"}').rstrip(b"=")
    body = head + b"." + _person().split(b".")[1]
    tag = base64.urlsafe_b64encode(hmac.digest(pem, body, hashlib.sha256)).rstrip(b"=")
    return body + b"." + tag


def _flipped(token: bytes, part: int) -> bytes:
    parts = token.split(b".")
    middle = len(parts[part]) // 2
    swapped = b"A" if parts[part][middle : middle + 1] != b"A" else b"B"
    parts[part] = parts[part][:middle] + swapped + parts[part][middle + 1 :]
    return b".".join(parts)


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(_unsigned(), id="alg none"),
        pytest.param(_symmetric(), id="alg HS256 with the public key"),
        pytest.param(_person(_RSA, "RS384"), id="an algorithm that is not pinned"),
        pytest.param(_person(_RSA, "PS256"), id="PSS where PKCS 1 is pinned"),
        pytest.param(_person(_RSA, "RS256", "e1"), id="an algorithm that is not the key's"),
        pytest.param(_person(_OTHER), id="another key"),
        pytest.param(_person(kid="r2"), id="an unknown kid"),
        pytest.param(_person(kid=None), id="no kid"),
        pytest.param(_person(exp=_NOW - 31), id="expired"),
        pytest.param(_person(exp=None), id="no expiry"),
        pytest.param(_person(exp=float("nan")), id="expiry is no number"),
        pytest.param(_person(nbf=_NOW + 60), id="not yet valid"),
        pytest.param(_person(iat=_NOW + 60), id="issued in the future"),
        pytest.param(_person(aud="other"), id="another audience"),
        pytest.param(_person(aud=None), id="no audience"),
        pytest.param(_person(iss="https://evil.example"), id="another issuer"),
        pytest.param(_person(iss=None), id="no issuer"),
        pytest.param(_person(iss=["x"]), id="an issuer that is no text"),
        pytest.param(_person(preferred_username=None), id="nobody"),
        pytest.param(_person(preferred_username="a\nb"), id="a name that breaks a line"),
        pytest.param(_flipped(_person(), 1), id="a flipped claim"),
        pytest.param(_flipped(_person(), 2), id="a flipped signature"),
        pytest.param(b"a.b.c", id="junk"),
        pytest.param(b".." + b"A" * 9000, id="too long"),
    ],
)
def test_a_token_that_does_not_verify_opens_nothing(tokens: Tokens, token: bytes) -> None:
    with pytest.raises(TokenRefused):
        tokens.verify(token, path="/predict")


def test_a_known_token_is_not_verified_again_until_it_expires(
    tokens: Tokens, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    decode = jwt.decode

    def counted(*arguments: Any, **options: Any) -> Any:
        verified.append(1)
        return decode(*arguments, **options)

    monkeypatch.setattr(jwt, "decode", counted)
    token = _person()

    for _ in range(5):
        tokens.verify(token, path="/predict")
    assert len(verified) == 1
    clock.now = _NOW + 631

    with pytest.raises(TokenRefused):
        tokens.verify(token, path="/predict")


# --- record systems ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token",
    [
        _call(),
        _call(key=_RSA, alg="RS384", kid="c2"),
        _call(aud=[_BASE + "/cds-services/tiny"]),
    ],
)
def test_a_record_system_may_call_once(tokens: Tokens, token: bytes) -> None:
    caller = tokens.verify(token, path="/cds-services/tiny")

    assert caller == Caller(f"cds:{_EHR}", frozenset({"clinician"}))
    with pytest.raises(TokenRefused):
        tokens.verify(token, path="/cds-services/tiny")


def test_a_nonce_is_not_taken_again_in_another_token(tokens: Tokens) -> None:
    tokens.verify(_call(jti="n7"), path="/cds-services/tiny")

    with pytest.raises(TokenRefused):
        tokens.verify(_call(jti="n7", exp=_NOW + 60), path="/cds-services/tiny")
    tokens.verify(_call(jti="n8"), path="/cds-services/tiny")


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(_call(key=_RSA, alg="RS256", kid="c2"), id="RS256"),
        pytest.param(_call(key=_P256, alg="ES256"), id="ES256"),
        pytest.param(_call(key=_OTHER, alg="RS384", kid="c2"), id="another key"),
        pytest.param(_call(kid="c9"), id="an unknown kid"),
        pytest.param(_call(jti=None), id="no nonce"),
        pytest.param(_call(jti=7), id="a nonce that is no text"),
        pytest.param(_call(iat=None), id="no time of issue"),
        pytest.param(_call(exp=_NOW + 301), id="too long a life"),
        pytest.param(_call(exp=_NOW - 31), id="expired"),
        pytest.param(_call(iat=_NOW - 1, exp=_NOW + 60), id="from before the adapter started"),
        pytest.param(_call("/cds-services/other"), id="for another service"),
        pytest.param(_call(aud="/cds-services/tiny"), id="for no whole URL"),
        pytest.param(_call(headers={"typ": "at+jwt"}), id="another type"),
    ],
)
def test_a_call_that_does_not_verify_opens_nothing(tokens: Tokens, token: bytes) -> None:
    with pytest.raises(TokenRefused):
        tokens.verify(token, path="/cds-services/tiny")


def test_a_record_systems_token_opens_only_cds_services(tokens: Tokens) -> None:
    with pytest.raises(TokenRefused):
        tokens.verify(_call("/predict"), path="/predict")


# --- over HTTP ---------------------------------------------------------------------------------


@pytest.fixture
def app(tmp_path: Path, tokens: Tokens) -> App:
    identity = Identity.generate_publisher()
    folder = publish_sample(tmp_path / "registry", identity)
    catalogue = Catalogue([start_engine(read_release(folder, identity.public))])
    return App(Service(catalogue, Gate((), tokens=tokens)))


def test_tokens_and_roles_decide_who_is_answered(app: App) -> None:
    def status(path: str, token: bytes | None, method: str = "POST") -> int:
        headers = {} if token is None else {"Authorization": f"Bearer {token.decode()}"}
        return ask(app, method, path, _PATIENT if method == "POST" else b"", headers).status

    it = _person(realm_access={"roles": ["it"]})
    assert status("/predict", None) == 401
    assert status("/predict", _person()) == 200
    assert status("/predict", it) == 403
    assert status("/predict", _person(realm_access={"roles": []})) == 403
    assert status("/metrics", it, "GET") == 200
    assert status("/metrics", _person(), "GET") == 403
    assert status("/predict", _person(_OTHER)) == 401
    # Let in, and told that a hook has another body.
    assert status("/cds-services/tiny", _call(jti="h1")) == 400
    assert status("/cds-services/tiny", _call(jti="h1")) == 401
    assert status("/predict", _call(jti="h2")) == 401


def test_a_key_and_a_token_both_open(tmp_path: Path, tokens: Tokens) -> None:
    key = add_key(tmp_path / "keys.json", name="ward", role="clinician")
    gate = Gate(read_keys(tmp_path / "keys.json"), tokens=tokens)

    def name(bearer: str) -> str:
        return gate.admit([(b"authorization", f"Bearer {bearer}".encode())], ("clinician",)).name

    assert name(key) == "ward"
    assert name(_person().decode()) == "oidc:dr.house"


def test_an_adapter_reads_its_token_file(tmp_path: Path) -> None:
    import time

    identity = Identity.generate_publisher()
    store = Store(tmp_path / "store")
    store.install(publish_sample(tmp_path / "registry", identity), identity.public)
    (store.folder / "tokens.json").write_text(json.dumps(_CONFIG))
    (store.folder / "ehr.json").write_text('{"keys": []}')
    (store.folder / "idp.json").write_text(json.dumps({"keys": [_public(_RSA, "r1")]}))
    token = _person(iat=time.time(), exp=time.time() + 60).decode()

    with adapter(store.folder, tmp_path / "ready.json") as (address, _):
        url = f"{address}/predict"
        nobody = httpx.post(url, json=_PATIENT)
        doctor = httpx.post(url, json=_PATIENT, headers={"Authorization": f"Bearer {token}"})

    assert (nobody.status_code, doctor.status_code) == (401, 200)


# --- key sets and the file ---------------------------------------------------------------------


def test_a_rotated_key_is_found_soon_and_the_set_is_not_asked_at_every_request(
    tmp_path: Path,
) -> None:
    file, now = tmp_path / "keys.json", [0.0]
    file.write_text(json.dumps({"keys": [_public(_RSA, "old")]}))
    keys = KeySet(file, clock=lambda: now[0])
    keys.refresh()
    file.write_text(json.dumps({"keys": [_public(_RSA, "new")]}))

    assert keys.find("new") is None
    keys.refresh()
    assert keys.find("new") is None  # asked for a moment ago
    now[0] = 11
    keys.refresh()

    assert keys.find("new") is not None
    assert keys.find("old") is None


def test_a_set_that_cannot_be_read_leaves_the_keys_and_is_said(tmp_path: Path) -> None:
    file, now = tmp_path / "keys.json", [0.0]
    file.write_text(json.dumps({"keys": [_public(_RSA, "r1")]}))
    keys = KeySet(file, clock=lambda: now[0])
    assert keys.refresh() is None
    for broken in ("{", "[]", '{"keys": 3}', '{"keys": "' + "x" * 2**20 + '"}'):
        now[0] += 400
        file.write_text(broken)

        assert "cannot be read" in str(keys.refresh())
    assert keys.find("r1") is not None


def test_symmetric_and_encryption_keys_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    entries: list[Any] = [
        {"kty": "oct", "kid": "s", "k": "c2VjcmV0"},
        {**_public(_RSA, "e"), "use": "enc"},
        {"kty": "EC", "kid": "broken", "crv": "P-999", "x": "", "y": ""},
        "junk",
        _public(_P384, "good"),
    ]
    file.write_text(json.dumps({"keys": entries}))
    keys = KeySet(file)
    keys.refresh()

    assert [kid for kid in ("s", "e", "broken", "good") if keys.find(kid)] == ["good"]


@pytest.fixture
def served() -> Any:
    """A key set over HTTP on loopback; `/moved` leads there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("location", "/keys")
            self.end_headers()
            self.wfile.write(json.dumps({"keys": [_public(_P384, "c1")]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_set_is_read_from_a_url_and_no_redirect_is_followed(served: str) -> None:
    here, moved = KeySet(f"{served}/keys"), KeySet(f"{served}/moved")

    assert here.refresh() is None
    assert here.find("c1") is not None
    assert "cannot be read" in str(moved.refresh())
    assert moved.find("c1") is None


_Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c["oidc"][0].update(algorithms=["HS256"]), "algorithms"),
        (lambda c: c["oidc"][0].update(algorithms=["none"]), "algorithms"),
        (lambda c: c["oidc"][0].update(algorithms=[]), "algorithms"),
        (lambda c: c["oidc"][0].update(roles={"x": "god"}), "roles"),
        (lambda c: c["oidc"][0].update(roles={}), "roles"),
        (lambda c: c["oidc"][0].update(jwks="http://idp.example/keys"), "https"),
        (lambda c: c["oidc"][0].update(typo=1), "oidc"),
        (lambda c: c["oidc"][0].pop("audience"), "audience"),
        (lambda c: c.pop("base_url"), "base_url"),
        (lambda c: c.update(oidc=[], cds_clients=[]), "issuer"),
        (lambda c: c["cds_clients"][0].update(issuer=_ISSUER), "twice"),
        (lambda c: c.update(cds_clients={}), "cds_clients"),
    ],
)
def test_a_wrong_file_is_refused_with_why(tmp_path: Path, change: _Change, why: str) -> None:
    config = json.loads(json.dumps(_CONFIG))
    change(config)
    (tmp_path / "tokens.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=why):
        read_tokens(tmp_path / "tokens.json")


def test_without_pyjwt_the_extra_is_named_and_without_a_file_nothing_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    assert read_tokens(tmp_path / "tokens.json") is None
    (tmp_path / "tokens.json").write_text(json.dumps(_CONFIG))

    with pytest.raises(ConfigError, match=r"fedward\[oidc\]"):
        read_tokens(tmp_path / "tokens.json")
