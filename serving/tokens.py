"""Tokens instead of keys: who a hospital's identity provider, or its record system, says asks.

Two kinds, told apart by their issuer:

- OpenID Connect: a person's bearer token. It is verified once and then known by its SHA-256 until
  it expires. Roles come from one of its claims.
- CDS Hooks 2.0.1, "Trusting CDS Clients": a record system signs a new token for each request. It
  opens only the very path that its `aud` names, and only once.

The adapter trusts the issuers and key sets that its own file names, never a header (`jku`, `x5u`,
`jwk`) of a token. Needs the extra `oidc`.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedward.core.errors import ConfigError
from fedward.serving.roles import Caller, Role

if TYPE_CHECKING:
    from fedward.serving.keysets import KeySet

# RFC 8725, section 3.1: what is expected is pinned; nothing symmetric, and never `none`.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
_CDS_ALGORITHMS = ("ES384", "RS384")
_LEEWAY = 30  # seconds that two clocks may differ
_LONGEST_LIFE = 300  # seconds from a CDS client's `iat` to its `exp`
_MOST_BYTES = 8192
_MOST_KNOWN = 4096
_MOST_USED = 100_000
_LONGEST_NAME = 64


class TokenRefused(Exception):
    """A token does not verify. Every cause looks alike from outside."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, and the one algorithm that it is for, where its set says so."""

    public: Any
    algorithm: object


@dataclass(frozen=True, slots=True)
class Provider:
    """An OpenID Connect provider.

    Attributes:
        issuer: Its `iss`, exactly.
        audience: What its tokens for this adapter have as `aud`.
        keys: Its key set.
        algorithms: Which of `ALGORITHMS` it signs with.
        roles_claim: The claim that holds roles; dots go into objects, as `realm_access.roles`.
        roles: Its roles to the adapter's.
        name_claim: The claim that the audit log calls a person by.
    """

    issuer: str
    audience: str
    keys: "KeySet"
    algorithms: tuple[str, ...]
    roles_claim: str
    roles: Mapping[str, Role]
    name_claim: str = "sub"


@dataclass(frozen=True, slots=True)
class CdsClient:
    """A record system that may call the CDS services."""

    issuer: str
    keys: "KeySet"


class Tokens:
    """Verifies tokens.

    Args:
        providers: Whose tokens of persons are taken.
        clients: Whose CDS Hooks tokens are taken.
        base_url: Where CDS clients reach this adapter, such as `https://adapter.example:8443`.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        providers: tuple[Provider, ...] = (),
        clients: tuple[CdsClient, ...] = (),
        *,
        base_url: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._providers = {provider.issuer: provider for provider in providers}
        self._clients = {client.issuer: client for client in clients}
        self._base, self._clock = base_url.rstrip("/"), clock
        self._started = clock()
        self._known: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()
        self._used: OrderedDict[tuple[str, str], float] = OrderedDict()
        import_jwt()

    def verify(self, token: bytes, *, path: str) -> Caller:
        """Whom a token is of.

        Args:
            token: As presented.
            path: The path of the request, which a CDS client's token must name.

        Raises:
            TokenRefused: It does not verify, has expired, was used before, or is of nobody known.
        """
        if len(token) > _MOST_BYTES:
            raise TokenRefused
        hashed = hashlib.sha256(token).digest()
        known = self._known.get(hashed)
        if known is not None:
            if known[1] > self._clock():
                return known[0]
            del self._known[hashed]
        header, claims = _read(token)
        issuer = claims.get("iss")
        if not isinstance(issuer, str):
            raise TokenRefused
        if issuer in self._clients:
            return self._verify_client(self._clients[issuer], token, header, path=path)
        if issuer in self._providers:
            bearer, until = self._verify_person(self._providers[issuer], token, header)
            self._known[hashed] = bearer, until
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
            return bearer
        raise TokenRefused

    def refresh(self) -> list[str]:
        """Read the key sets again, where it is time; blocks. What went wrong, in words."""
        sources = [provider.keys for provider in self._providers.values()]
        sources += [client.keys for client in self._clients.values()]
        problems = [keys.refresh() for keys in sources]
        return [problem for problem in problems if problem is not None]

    def _verify_person(
        self, provider: Provider, token: bytes, header: Mapping[str, Any]
    ) -> tuple[Caller, float]:
        claims = self._decode(
            token, header, provider.keys, provider.algorithms,
            issuer=provider.issuer, audience=provider.audience, require=["exp", "iss", "aud"],
        )  # fmt: skip
        name = claims.get(provider.name_claim)
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise TokenRefused
        said = _claim(claims, provider.roles_claim)
        found = said.split() if isinstance(said, str) else said
        listed = (
            [role for role in found if isinstance(role, str)] if isinstance(found, list) else []
        )
        roles = frozenset(provider.roles[role] for role in listed if role in provider.roles)
        # A key's name holds no colon: nobody can take another's name in the audit log.
        bearer = Caller(f"oidc:{name[:_LONGEST_NAME]}", roles)
        return bearer, float(claims["exp"])

    def _verify_client(
        self, client: CdsClient, token: bytes, header: Mapping[str, Any], *, path: str
    ) -> Caller:
        if header.get("typ") != "JWT":
            raise TokenRefused
        claims = self._decode(
            token, header, client.keys, _CDS_ALGORITHMS,
            issuer=client.issuer, audience=self._base + path.rstrip("/"),
            require=["exp", "iat", "iss", "aud", "jti"],
        )  # fmt: skip
        issued, expires, nonce = claims["iat"], claims["exp"], claims["jti"]
        if not isinstance(nonce, str) or not nonce or expires - issued > _LONGEST_LIFE:
            raise TokenRefused
        # What was used before a restart is not remembered, so that nothing older is taken.
        if issued < int(self._started) or not path.startswith("/cds-services"):
            raise TokenRefused
        self._use((client.issuer, nonce), until=expires + _LEEWAY)
        return Caller(f"cds:{client.issuer[:_LONGEST_NAME]}", frozenset(("clinician",)))

    def _use(self, token: tuple[str, str], *, until: float) -> None:
        """Mark a nonce as used, once."""
        now = self._clock()
        while self._used and next(iter(self._used.values())) < now - _LONGEST_LIFE:
            self._used.popitem(last=False)  # the oldest; none lives longer than that
        if token in self._used or len(self._used) >= _MOST_USED:
            raise TokenRefused
        self._used[token] = until

    def _decode(
        self,
        token: bytes,
        header: Mapping[str, Any],
        keys: "KeySet",
        algorithms: tuple[str, ...],
        *,
        issuer: str,
        audience: str,
        require: list[str],
    ) -> dict[str, Any]:
        jwt = import_jwt()
        key = keys.find(header.get("kid"))
        named = header.get("alg")
        if key is None or named not in algorithms or key.algorithm not in (None, named):
            raise TokenRefused
        try:
            claims: dict[str, Any] = jwt.decode(
                token, key.public, algorithms=[named], audience=audience, issuer=issuer,
                options={"require": require, "verify_exp": False, "verify_iat": False,
                         "verify_nbf": False},
            )  # fmt: skip
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise TokenRefused from error
        now = self._clock()
        # By our clock, so that it can be tested: PyJWT has no other than the machine's.
        times = [claims.get(name, now) for name in ("exp", "iat", "nbf")]
        if not all(isinstance(when, (int, float)) and when == when for when in times):  # noqa: PLR0124 (NaN)
            raise TokenRefused
        expires, issued, begins = times
        if expires <= now - _LEEWAY or issued > now + _LEEWAY or begins > now + _LEEWAY:
            raise TokenRefused
        return claims


def import_jwt() -> Any:
    """PyJWT. Raises `ConfigError` where it is not installed."""
    try:
        import jwt
    except ImportError as error:
        raise ConfigError("need PyJWT; run: pip install fedward[oidc]", file="tokens") from error
    return jwt


def _read(token: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """A token's header and claims, unverified: they only choose the key to verify with."""
    jwt = import_jwt()
    try:
        whole = jwt.decode_complete(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise TokenRefused from error
    return whole["header"], whole["payload"]


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    if name in claims:
        return claims[name]  # some providers' claims are URLs, with dots
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
