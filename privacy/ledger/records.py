"""What a ledger's entries say, and how each is tied to those before it.

An entry's body is canonical JSON: it holds its number and the digest of the body before it, and
the site signs it. So a body cannot be changed, removed from the middle or moved without the
site's key; that the end is missing shows only against a head that somebody else has seen.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from fedward.core.canonical import canonical_json, digest
from fedward.core.errors import LedgerCorrupt, SignatureInvalid
from fedward.core.identity import Identity, PublicIdentity
from fedward.privacy.accounting import DpEvent, Unit

FORMAT = 1
Kind = Literal["genesis", "allot", "reserve", "settle", "close"]
Population = Literal["training", "held-out", "all"]
POPULATIONS: tuple[Population, ...] = ("training", "held-out", "all")

NO_HASH = "0" * 64
"""What the first entry names as the one before it."""

_SIGNED_AS = b"fedward ledger entry 1\x00"
_KEYS: dict[str, frozenset[str]] = {
    "genesis": frozenset({"site", "simulated", "key", "ledger"}),
    "allot": frozenset(
        {"study", "population", "unit", "event", "delta", "max_epsilon", "spent", "epsilon"}
    ),
    "reserve": frozenset({"study", "round", "event"}),
    "settle": frozenset({"reservation", "update_digest"}),
    "close": frozenset({"study", "delta", "epsilon"}),
}
_COMMON = frozenset({"format", "seq", "previous", "time", "kind"})


@dataclass(frozen=True, slots=True)
class Row:
    """An entry as it is stored: number, body, signature."""

    seq: int
    body: bytes
    signature: bytes

    @property
    def hash(self) -> str:
        """SHA-256 of the body, which the next entry names."""
        return digest(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """A study's right to spend; what it does not reserve comes back when it is closed.

    Attributes:
        study: The study it is for.
        population: Whose budget it draws on.
        unit: The unit of privacy of its event.
        epsilon: Joint total of the population if all that is allotted is used, at `delta`.
        max_epsilon: The limit that `epsilon` was held against.
        delta: As in the site's policy.
        seq: Its entry.
    """

    study: str
    population: Population
    unit: Unit
    epsilon: float
    max_epsilon: float
    delta: float
    seq: int


class Reservation(NamedTuple):
    """Leave to train once. Counts as spent from the moment that it exists."""

    study: str
    round_number: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry, for people: what is empty does not apply to its kind.

    Attributes:
        state: "open" or "closed" of an allotment, "reserved" or "settled" of a reservation.
        epsilon: Joint total that was recorded with an allotment or a close.
    """

    seq: int
    kind: Kind
    time: datetime
    hash: str
    study: str = ""
    round_number: int | None = None
    population: Population | None = None
    unit: Unit | None = None
    event: DpEvent = None
    state: str = ""
    epsilon: float | None = None
    delta: float | None = None
    max_epsilon: float | None = None
    update_digest: str = ""


def write_body(
    kind: Kind, content: dict[str, Any], *, seq: int, previous: str, time: datetime | None = None
) -> bytes:
    """The next entry, unsigned; `time` is now unless it happened before."""
    return canonical_json(
        {
            "format": FORMAT,
            "seq": seq,
            "previous": previous,
            "time": (time or datetime.now(UTC)).isoformat(timespec="microseconds"),
            "kind": kind,
            **content,
        }
    )


def sign_row(seq: int, body: bytes, identity: Identity) -> Row:
    """An entry as it is stored."""
    return Row(seq, body, identity.sign(_SIGNED_AS + body))


def read_row(row: Row, *, seq: int, previous: str) -> dict[str, Any]:
    """Read an entry's body and check its place in the chain.

    Raises:
        LedgerCorrupt: It is not the body that belongs here.
    """
    if row.seq != seq:
        raise LedgerCorrupt(
            f"entry {seq} is missing: the next one found is {row.seq}; restore the ledger's file "
            "from a copy at least as new as the head that others have seen"
        )
    try:
        body = json.loads(row.body)
        if not isinstance(body, dict) or canonical_json(body) != row.body:
            raise LedgerCorrupt(f"entry {seq} is not in canonical form: its text was changed")
        keys = _KEYS.get(str(body.get("kind")))
        if keys is None or set(body) != keys | _COMMON or body["format"] != FORMAT:
            raise LedgerCorrupt(f"entry {seq} is of a kind or a format that is not known")
        datetime.fromisoformat(body["time"])
    except (ValueError, TypeError, RecursionError) as error:
        raise LedgerCorrupt(f"entry {seq} cannot be read: its text was changed") from error
    if body["seq"] != seq:
        raise LedgerCorrupt(f"entry {seq} says that it is entry {body['seq']}: entries were moved")
    if body["previous"] != previous:
        raise LedgerCorrupt(f"entry {seq} does not follow entry {seq - 1}: one of them was changed")
    return body


def check_signature(row: Row, public: PublicIdentity) -> None:
    """Raises `LedgerCorrupt` if the site's key did not sign this entry."""
    try:
        public.verify(row.signature, _SIGNED_AS + row.body)
    except SignatureInvalid as error:
        raise LedgerCorrupt(f"entry {row.seq}: {error}; it was changed after it was made") from None
