"""The ledgers of many simulated sites in one database.

A thousand simulated sites must not cost a thousand files and a flush of the disk for each entry.
Their ledgers follow the same rules in the same code; entries are kept in memory as short texts,
put into one file when the simulation says so, and chained and signed when somebody looks at them.
Nothing of this is for a real site, whose entries are durable before it trains.
"""

import contextlib
import json
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward.core.canonical import digest
from fedward.core.errors import LedgerCorrupt, PrivacyError, RunError
from fedward.core.identity import Identity, PublicIdentity
from fedward.privacy.ledger import storage
from fedward.privacy.ledger.book import Ledger
from fedward.privacy.ledger.journal import Journal
from fedward.privacy.ledger.records import NO_HASH, Kind, Row, sign_row, write_body
from fedward.privacy.ledger.state import State

_LAYOUT = 2  # of the file; 1 had a row for each entry
_SCHEMA = f"""
BEGIN;
CREATE TABLE sites (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, key BLOB NOT NULL)
    STRICT;
CREATE TABLE pages (number INTEGER PRIMARY KEY, entries TEXT NOT NULL) STRICT;
PRAGMA user_version = {_LAYOUT};
COMMIT;
"""
_PAGE = 4096  # entries in a row of the database: a row for each takes longer than the entry
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ENCODE = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode
_MOST_TEXTS = 4096
_texts_of_events: "dict[int, tuple[dict[str, Any], str]]" = {}


class SimulatedLedgers:
    """Opens the ledgers of simulated sites, and keeps them all in one file.

    Args:
        file: Where they are kept; what an earlier run left there is gone on from.

    Raises:
        RunError: The file was left by another version of Fedward.
        LedgerCorrupt: What the file holds does not make sense.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._database = _connect(file)
        self._journals: dict[str, _MemoryJournal] = {}
        self._new_sites: list[tuple[int, str, bytes]] = []
        self._new_entries: list[tuple[int, str]] = []
        texts = _all_texts(self._database)
        known = self._database.execute("SELECT number, name, key FROM sites").fetchall()
        for number, name, key in known:
            self._journals[name] = _journal(number, key, texts[number], new=self._new_entries)
        self._count = len(known)

    def identity(self, site: str) -> Identity:
        """A site's identity; made where there is none.

        Raises:
            LedgerCorrupt: What the file holds does not make sense.
        """
        if site not in self._journals:
            self.open(site)
        return self._journals[site].identity

    def open(self, site: str) -> tuple[Identity, Ledger]:
        """A site's identity and ledger; both are made where there are none.

        Raises:
            LedgerCorrupt: What the file holds does not make sense.
        """
        journal = self._journals.get(site)
        if journal is None:
            key = _private_bytes(Identity.generate_site())
            journal = _MemoryJournal(key, self._count, self._new_entries)
            self._new_sites.append((self._count, site, key))
            self._journals[site] = journal
            self._count += 1
        journal.begin(site, simulated=True)
        return journal.identity, Ledger(journal)

    def save(self) -> None:
        """Write what is new since the last time: all of it or, if the process dies, none.

        It is not flushed to disk: what a power cut takes of a simulation is only a simulation.

        Raises:
            PrivacyError: The file cannot be written. What is new is kept for the next time.
        """
        sites, entries = self._new_sites[:], self._new_entries[:]
        if not (sites or entries):
            return
        pages = (entries[start : start + _PAGE] for start in range(0, len(entries), _PAGE))
        try:
            with storage.transaction(self._database):
                self._database.executemany("INSERT INTO sites VALUES (?, ?, ?)", sites)
                self._database.executemany(
                    "INSERT INTO pages (entries) VALUES (?)", ((_page(page),) for page in pages)
                )
        except sqlite3.Error as error:
            raise PrivacyError(
                f"{self._file} cannot be written ({error}); make room on its disk, and resume"
            ) from error
        del self._new_sites[: len(sites)]
        del self._new_entries[: len(entries)]

    def shut(self) -> None:
        """Close the file."""
        self._database.close()


def take_out(file: Path, site: str, *, state: Path) -> None:
    """Write one simulated site's identity and ledger into its state folder, as a site keeps them.

    What the folder holds is replaced. Nothing happens if the file knows no such site.

    Raises:
        RunError: The file was left by another version of Fedward.
        LedgerCorrupt: What the file holds does not make sense.
    """
    if not file.is_file():
        return
    with contextlib.closing(_connect(file)) as database:
        found = database.execute("SELECT number, key FROM sites WHERE name = ?", (site,)).fetchone()
        if found is None:
            return
        number, key = found
        texts = [text for owner, text in _entries(database) if owner == number]
    journal = _journal(number, key, texts, new=[])
    journal.identity.save(state / "identity.pem")
    (state / "ledger.sqlite").unlink(missing_ok=True)
    connection = storage.connect(state / "ledger.sqlite")
    with contextlib.closing(connection), storage.transaction(connection):
        for row in journal.rows():
            storage.append(connection, row)


class _MemoryJournal(Journal):
    """Entries as they come, chained once somebody asks for the head, and signed for a reader.

    Args:
        key: The site's private key. A key object of OpenSSL is a kilobyte and more, so one is made
            each time that something is signed, and kept by nobody.
        number: The site's, in the file.
        new: Where entries that are not in the file yet are noted, for all sites together.
    """

    name = "the ledger of a simulated site"

    def __init__(self, key: bytes, number: int, new: list[tuple[int, str]]) -> None:
        # Not the parent's: there is no file and no connection.
        self._key = key
        self._made: Identity | None = None
        self.state = State()
        self._number, self._new = number, new
        self._lock = threading.RLock()
        self._texts: list[str] = []
        self._seq, self._hash, self._chained = -1, NO_HASH, 0

    @property
    def identity(self) -> Identity:
        """The site's."""
        return self._made or Identity(Ed25519PrivateKey.from_private_bytes(self._key))

    @property
    def public(self) -> PublicIdentity:
        return self.identity.public

    @property
    def head(self) -> str:
        for body in self._bodies(self._chained, self._hash):
            self._hash, self._chained = digest(body), self._chained + 1
        return f"{self._seq}:{self._hash}"

    def begin(self, site: str, *, simulated: bool) -> None:
        self._made = self.identity
        try:
            super().begin(site, simulated=simulated)
        finally:
            self._made = None

    def shut(self) -> None:
        """Nothing is open."""

    def rows(self) -> list[Row]:
        identity = self.identity
        return [sign_row(seq, body, identity) for seq, body in enumerate(self._bodies(0, NO_HASH))]

    def _bodies(self, first: int, previous: str) -> Iterator[bytes]:
        """The entries from number `first`, which follows one whose digest is `previous`."""
        for seq, text in enumerate(self._texts[first:], start=first):
            kind, moment, content = json.loads(text)
            made = _EPOCH + timedelta(microseconds=moment)
            body = write_body(kind, content, seq=seq, previous=previous, time=made)
            previous = digest(body)
            yield body

    def change(self) -> contextlib.AbstractContextManager[object]:
        # A ledger checks before it appends, so there is nothing to roll back.
        return self._lock

    def current(self) -> contextlib.AbstractContextManager[object]:
        return self._lock

    def append(self, kind: Kind, content: dict[str, Any]) -> int:
        seq = self._seq + 1
        self.state.apply({"seq": seq, "kind": kind, **content})
        self._seq = seq
        text = _text(kind, time.time_ns() // 1000, content)
        self._texts.append(text)
        self._new.append((self._number, text))
        return seq

    def take(self, texts: Sequence[str]) -> None:
        """Go on from entries that are in the file."""
        for seq, text in enumerate(texts):
            kind, _, content = json.loads(text)
            self.state.apply({"seq": seq, "kind": kind, **content})
            self._seq = seq
        self._texts.extend(texts)


def _text(kind: Kind, moment: int, content: dict[str, Any]) -> str:
    """An entry in the file: kind, microseconds since 1970, content, as JSON.

    What is written in every round is put together by hand, in a quarter of the encoder's time.
    """
    match kind:
        case "reserve":
            study, number = quoted(content["study"]), content["round"]
            event = _text_of_event(content["event"])
            return f'["{kind}",{moment},{{"study":{study},"round":{number:d},"event":{event}}}]'
        case "settle":
            number, update = content["reservation"], quoted(content["update_digest"])
            return f'["{kind}",{moment},{{"reservation":{number:d},"update_digest":{update}}}]'
        case _:
            return _ENCODE([kind, moment, content])


def _text_of_event(event: dict[str, Any]) -> str:
    """The JSON of an event, remembered by object: all sites of a study note the same one."""
    found = _texts_of_events.get(id(event))
    if found is None or found[0] is not event:
        if len(_texts_of_events) >= _MOST_TEXTS:
            _texts_of_events.clear()
        found = event, _ENCODE(event)
        _texts_of_events[id(event)] = found
    return found[1]


def _page(entries: Sequence[tuple[int, str]]) -> str:
    return f"[{','.join([f'[{number},{quoted(text)}]' for number, text in entries])}]"


def _connect(file: Path) -> sqlite3.Connection:
    file.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(file, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = OFF")
        (layout,) = connection.execute("PRAGMA user_version").fetchone()
        if connection.execute("SELECT 1 FROM sqlite_schema").fetchone() is None:
            connection.executescript(_SCHEMA)
            layout = _LAYOUT
    except sqlite3.DatabaseError as error:
        connection.close()
        raise LedgerCorrupt(f"{file} cannot be read: {error}") from error
    if layout != _LAYOUT:
        connection.close()
        raise RunError(
            f"{file} was left by another version of Fedward (layout {layout or 1}, and this one "
            f"reads {_LAYOUT}): go on with that version, or begin the run anew"
        )
    return connection


def _entries(database: sqlite3.Connection) -> Iterator[tuple[int, str]]:
    """Every entry and its site's number, in the order in which they were made."""
    try:
        for (page,) in database.execute("SELECT entries FROM pages ORDER BY number"):
            yield from json.loads(page)
    except (sqlite3.DatabaseError, ValueError) as error:
        raise LedgerCorrupt(f"the simulated ledgers cannot be read: {error}") from error


def _all_texts(database: sqlite3.Connection) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for number, text in _entries(database):
        found[number].append(text)
    return found


def _journal(
    number: int, key: bytes, texts: Sequence[str], *, new: list[tuple[int, str]]
) -> _MemoryJournal:
    journal = _MemoryJournal(key, number, new)
    try:
        journal.take(texts)
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerCorrupt(f"the ledger of simulated site {number} cannot be read") from error
    return journal


def _private_bytes(identity: Identity) -> bytes:
    if not isinstance(identity.key, Ed25519PrivateKey):
        raise TypeError("a site's identity is Ed25519")
    return identity.key.private_bytes_raw()
