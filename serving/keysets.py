"""JSON Web Key Sets (RFC 7517) of those whose tokens are taken, and the file that names them.

`STORE/tokens.json`::

    {"oidc": [{"issuer": "https://id.example", "audience": "fedward", "jwks": "keys.json",
               "algorithms": ["RS256"], "roles_claim": "realm_access.roles",
               "roles": {"physician": "clinician"}, "name_claim": "preferred_username"}],
     "cds_clients": [{"issuer": "https://ehr.example", "jwks": "https://ehr.example/jwks"}],
     "base_url": "https://adapter.example:8443"}

`jwks` is a file, relative to this one, or a URL inside the hospital.
"""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, get_args

from fedward.core.errors import ConfigError
from fedward.serving.roles import Role
from fedward.serving.tokens import ALGORITHMS, CdsClient, Key, Provider, Tokens, import_jwt

_MOST_BYTES = 2**20
_TIMEOUT = 5.0
_EVERY = 300.0  # seconds between two reads
_AT_LEAST = 10.0  # also when an unknown key was asked for
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class KeySet:
    """Public keys by `kid`, read again every five minutes, or soon after an unknown one.

    Args:
        source: A path or a URL. One that cannot be read leaves the keys that were read before.
        clock: Seconds, monotonic.
    """

    def __init__(self, source: Path | str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._source, self._clock = source, clock
        self._keys: dict[str, Key] = {}
        self._read_at = -_EVERY
        self._wanted = True

    def find(self, kid: object) -> Key | None:
        """The key of this name; None if there is none (yet)."""
        key = self._keys.get(kid) if isinstance(kid, str) else None
        if key is None:
            self._wanted = True
        return key

    def refresh(self) -> str | None:
        """Read the set if it is time; blocks. What is wrong with it, if anything."""
        age = self._clock() - self._read_at
        if age < _AT_LEAST or (age < _EVERY and not self._wanted):
            return None
        self._read_at, self._wanted = self._clock(), False
        try:
            data = self._fetch()
            found = _parse(data)
        except (OSError, HTTPException, ValueError) as error:
            return f"the keys at {self._source} cannot be read: {type(error).__name__}"
        self._keys = found
        return None

    def _fetch(self) -> bytes:
        if isinstance(self._source, Path):
            with self._source.open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
        else:
            # Its scheme was checked; a redirect would lead to where nobody said.
            opener = urllib.request.build_opener(_NoRedirect)
            with opener.open(self._source, timeout=_TIMEOUT) as answer:
                data = answer.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError("too large")
        return bytes(data)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def read_tokens(file: Path, *, clock: Callable[[], float] = time.time) -> Tokens | None:
    """What a hospital's file says; None if it is not there. The key sets are not read yet.

    Raises:
        ConfigError: The file is malformed, or PyJWT is not installed.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError("cannot be read, or is not JSON", file=str(file)) from error
    top = _table(value, file, "the file", allowed="oidc cds_clients base_url")
    providers = tuple(_provider(entry, file) for entry in _list(top.get("oidc", []), file, "oidc"))
    clients = tuple(
        _client(entry, file) for entry in _list(top.get("cds_clients", []), file, "cds_clients")
    )
    base = top.get("base_url", "")
    if clients and not (isinstance(base, str) and base.startswith(("https://", "http://"))):
        raise ConfigError(
            "is needed for CDS clients: where they reach this adapter",
            file=str(file),
            key="base_url",
        )
    issuers = [p.issuer for p in providers] + [c.issuer for c in clients]
    if not issuers or len(set(issuers)) != len(issuers):
        raise ConfigError("names no issuer, or one twice", file=str(file))
    return Tokens(providers, clients, base_url=base, clock=clock)


def _provider(value: object, file: Path) -> Provider:
    names = "issuer audience jwks algorithms roles_claim roles name_claim"
    entry = _table(value, file, "oidc", allowed=names)
    algorithms = tuple(_list(entry.get("algorithms", ["RS256"]), file, "algorithms"))
    roles = entry.get("roles")
    if not algorithms or not set(algorithms) <= set(ALGORITHMS):
        raise ConfigError(f"must be of {', '.join(ALGORITHMS)}", file=str(file), key="algorithms")
    if not isinstance(roles, dict) or not roles or not set(roles.values()) <= set(get_args(Role)):
        raise ConfigError(f"must map to {', '.join(get_args(Role))}", file=str(file), key="roles")
    return Provider(
        issuer=_text(entry, "issuer", file),
        audience=_text(entry, "audience", file),
        keys=_keys(entry, file),
        algorithms=algorithms,
        roles_claim=_text(entry, "roles_claim", file),
        roles=roles,
        name_claim=_text({"name_claim": "sub", **entry}, "name_claim", file),
    )


def _client(value: object, file: Path) -> CdsClient:
    entry = _table(value, file, "cds_clients", allowed="issuer jwks")
    return CdsClient(_text(entry, "issuer", file), _keys(entry, file))


def _keys(entry: Mapping[str, Any], file: Path) -> KeySet:
    source = _text(entry, "jwks", file)
    if "://" not in source:
        return KeySet(file.parent / source)
    url = urllib.parse.urlsplit(source)
    if url.scheme != "https" and not (url.scheme == "http" and url.hostname in _LOOPBACK):
        raise ConfigError("must be a file or an https:// URL", file=str(file), key="jwks")
    return KeySet(source)


def _parse(data: bytes) -> dict[str, Key]:
    """The set's signing keys by `kid`. Raises `ValueError`."""
    jwt = import_jwt()
    value = json.loads(data)
    entries = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        raise ValueError("no key set")  # noqa: TRY004 (a file's content, not a type)
    found = {}
    for entry in entries:
        # A symmetric key in a public set is a mistake, and would let whoever reads it sign.
        if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC"):
            continue
        kid = entry.get("kid")
        if not isinstance(kid, str) or entry.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK.from_dict({k: v for k, v in entry.items() if k != "d"}).key
            found[kid] = Key(key, entry.get("alg"))
        except jwt.PyJWTError:
            continue  # of a kind that this version does not know
    return found


def _table(value: object, file: Path, what: str, *, allowed: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not set(value) <= set(allowed.split()):
        raise ConfigError(f"{what} must be an object with the keys {allowed}", file=str(file))
    return value


def _list(value: object, file: Path, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError("must be a list", file=str(file), key=key)
    return value


def _text(entry: Mapping[str, Any], key: str, file: Path) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError("must be a text", file=str(file), key=key)
    return value
