"""Who may ask what: API keys with roles, tokens, and a limit on how fast.

A key is 32 random bytes, shown once when it is made; the adapter keeps its SHA-256 only. A key
this long cannot be guessed, so that a slow password hash would protect nothing and cost every
request.
"""

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from fedward.core.errors import ConfigError
from fedward.core.files import write_atomic
from fedward.serving.problems import Problem
from fedward.serving.roles import ANYONE, Caller, Role
from fedward.serving.tokens import TokenRefused, Tokens

Headers = Iterable[tuple[bytes, bytes]]
_PREFIX = "fw_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
# Every key is compared with every request, in the same time.
_MOST_KEYS = 64
_BURST_SECONDS = 2.0
_DOTS_OF_A_TOKEN = 2  # a key has none


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is kept of a key.

    Attributes:
        name: Whose it is; goes into the audit log.
        role: What it may do.
        sha256: Of the key's text, 64 hexadecimal digits.
    """

    name: str
    role: Role
    sha256: str


def add_key(file: Path, *, name: str, role: Role) -> str:
    """Make a key and keep its hash in `file`.

    Returns:
        The key: show it once, it cannot be had again.

    Raises:
        ConfigError: The file is malformed or full.
        ValueError: The name is taken or not allowed.
    """
    keys = read_keys(file)
    if not _NAME.fullmatch(name) or name in {key.name for key in keys}:
        raise ValueError(f"the name {name!r} is taken or not allowed")
    if len(keys) >= _MOST_KEYS:
        raise ConfigError(f"holds {_MOST_KEYS} keys, the most there can be", file=str(file))
    key = _PREFIX + secrets.token_urlsafe(32)
    _write(file, [*keys, ApiKey(name, role, _hash(key.encode()))])
    return key


def revoke_key(file: Path, *, name: str) -> None:
    """Remove a key. Raises `ConfigError`, or `ValueError` if there is none of this name."""
    keys = read_keys(file)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise ValueError(f"no key is named {name!r}")
    _write(file, left)


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """The keys in `file`; none if it is not there. Raises `ConfigError` if it is malformed."""
    try:
        entries = json.loads(file.read_bytes())
    except FileNotFoundError:
        return ()
    except ValueError as error:
        raise ConfigError("is not JSON; make the keys anew", file=str(file)) from error
    try:
        keys = tuple(ApiKey(**entry) for entry in entries)
        valid = all(k.role in get_args(Role) and _HASH.fullmatch(k.sha256) for k in keys)
    except TypeError:
        valid = False
        keys = ()
    if not valid:
        raise ConfigError("is malformed; make the keys anew", file=str(file))
    return keys


class Gate:
    """Admits requests.

    Args:
        keys: Whoever has one of these is admitted; with none of them and no `tokens`, everybody is.
        tokens: Whose tokens are taken, too.
        rate: Requests a second that one caller may make over time; short bursts may be faster.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        keys: Sequence[ApiKey],
        *,
        tokens: Tokens | None = None,
        rate: float = 5000.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = [(bytes.fromhex(k.sha256), Caller(k.name, frozenset((k.role,)))) for k in keys]
        self._tokens = tokens
        self._rate, self._clock = rate, clock
        self._spent: dict[str, tuple[float, float]] = {}

    def admit(self, headers: Headers, roles: Sequence[Role], *, path: str = "") -> Caller:
        """Who asks, if they may.

        Args:
            headers: The request's, names in lower case.
            roles: Which roles may; empty for any.
            path: The request's, which a CDS client's token must be for.

        Raises:
            Problem: 401 without a valid key or token, 403 with the wrong role, 429 when too fast.
        """
        if not self._keys and self._tokens is None:
            caller = ANYONE
        else:
            caller = self._identify(headers, path)
            if roles and caller.roles.isdisjoint(roles):
                has = " and ".join(sorted(caller.roles)) or "of none"
                raise Problem(403, f"the role {has} may not do this; {' or '.join(roles)} may")
        self._slow_down(caller)
        return caller

    def admit_again(self, caller: Caller) -> bool:
        """Whether a caller who was admitted may be so again for the same headers and roles.

        A key holds as long as the adapter runs; a token may have run out.

        Raises:
            Problem: 429 when too fast.
        """
        if self._tokens is not None:
            return False
        self._slow_down(caller)
        return True

    def _identify(self, headers: Headers, path: str) -> Caller:
        presented = b""
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                presented = value[7:].strip()
            elif name == b"x-api-key":
                presented = value
        if self._tokens is not None and presented.count(b".") == _DOTS_OF_A_TOKEN:
            try:
                return self._tokens.verify(presented, path=path)
            except TokenRefused:
                raise _unknown() from None
        hashed = hashlib.sha256(presented).digest()
        found: Caller | None = None
        for known, caller in self._keys:
            if hmac.compare_digest(known, hashed):
                found = caller
        if found is None:
            raise _unknown()
        return found

    def _slow_down(self, caller: Caller) -> None:
        """A token bucket for each caller."""
        now = self._clock()
        most = self._rate * _BURST_SECONDS
        tokens, then = self._spent.get(caller.name, (most, now))
        tokens = min(most, tokens + (now - then) * self._rate) - 1
        if tokens < 0:
            raise Problem(429, "too many requests; slow down", headers={"retry-after": "1"})
        self._spent[caller.name] = tokens, now


def _unknown() -> Problem:
    return Problem(
        401,
        "a valid API key or token is needed: Authorization: Bearer KEY",
        headers={"www-authenticate": "Bearer"},
    )


def _hash(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def _write(file: Path, keys: Sequence[ApiKey]) -> None:
    write_atomic(file, json.dumps([asdict(key) for key in keys], indent=2), mode=0o600)
