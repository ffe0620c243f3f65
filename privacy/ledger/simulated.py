"""The ledgers of many simulated sites in one database.

A thousand simulated sites must not cost a thousand files and a flush of the disk for each entry.
Their ledgers follow the same rules in the same code; entries are kept in memory, put into one
file when the simulation says so, and chained and signed when somebody looks at them. Nothing of
this is for a real site, whose entries are durable before it trains.
"""

import contextlib
import json
import sqlite3
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedward.core.errors import LedgerCorrupt
from fedward.core.identity import Identity
from fedward.privacy.ledger import storage
from fedward.privacy.ledger.book import Ledger
from fedward.privacy.ledger.journal import Journal
from fedward.privacy.ledger.records import NO_HASH, Kind, Row, write_row
from fedward.privacy.ledger.state import State

_ENCODE = json.JSONEncoder(check_circular=False).encode
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sites (name TEXT PRIMARY KEY, key BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS entries (
    site TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, time TEXT NOT NULL,
    content TEXT NOT NULL
) STRICT;
"""
# Kept up to date entry by entry, an index takes four times as long as the entries.
_INDEX = "CREATE UNIQUE INDEX IF NOT EXISTS entries_by_site ON entries (site, seq)"
_NO_INDEX = "DROP INDEX IF EXISTS entries_by_site"


class SimulatedLedgers:
    """Opens the ledgers of simulated sites, and keeps them all in one file.

    Args:
        file: Where they are kept; what an earlier run left there is gone on from.
    """

    def __init__(self, file: Path) -> None:
        self._database = _connect(file)
        self._journals: dict[str, _MemoryJournal] = {}
        self._indexed = True
        self._index()

    def open(self, site: str) -> tuple[Identity, Ledger]:
        """A site's identity and ledger; both are made where there are none.

        Raises:
            LedgerCorrupt: What the file holds does not make sense.
        """
        journal = _read(self._database, site)
        if journal is None:
            journal = _MemoryJournal(Identity.generate_site())
        journal.begin(site, simulated=True)
        self._journals[site] = journal
        return journal.identity, Ledger(journal)

    def save(self) -> None:
        """Write what is new since the last time: all of it or, if the process dies, none.

        It is not flushed to disk: what a power cut takes of a simulation is only a simulation.
        """
        if self._indexed:
            self._database.execute(_NO_INDEX)
            self._indexed = False
        with storage.transaction(self._database):
            for site, journal in self._journals.items():
                if journal.saved == 0:
                    row = (site, _private_bytes(journal.identity))
                    self._database.execute("INSERT OR IGNORE INTO sites VALUES (?, ?)", row)
            self._database.executemany(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?)",
                [
                    (site, number, kind, time.isoformat(), _ENCODE(content))
                    for site, journal in self._journals.items()
                    for number, (kind, content, time) in enumerate(journal.fresh(), journal.saved)
                ],
            )
        for journal in self._journals.values():
            journal.mark_saved()

    def shut(self) -> None:
        """Close the file."""
        self._index()
        self._database.close()

    def _index(self) -> None:
        """What a run that was killed left without an index is read with one."""
        self._database.execute(_INDEX)
        self._indexed = True


def take_out(file: Path, site: str, *, state: Path) -> None:
    """Write one simulated site's identity and ledger into its state folder, as a site keeps them.

    What the folder holds is replaced. Nothing happens if the file knows no such site.
    """
    if not file.is_file():
        return
    with contextlib.closing(_connect(file)) as database:
        journal = _read(database, site)
    if journal is None:
        return
    journal.identity.save(state / "identity.pem")
    (state / "ledger.sqlite").unlink(missing_ok=True)
    connection = storage.connect(state / "ledger.sqlite")
    with contextlib.closing(connection), storage.transaction(connection):
        for row in journal.rows():
            storage.append(connection, row)


class _MemoryJournal(Journal):
    """Entries as they come; each is chained and signed once somebody asks for it."""

    def __init__(self, identity: Identity) -> None:
        # Not the parent's: there is no file and no connection.
        self.name = "the ledger of a simulated site"
        self.identity = identity
        self.public = identity.public
        self.state = State()
        self.saved = 0
        self._lock = threading.RLock()
        self._entries: list[tuple[Kind, dict[str, Any], datetime]] = []
        self._rows: list[Row] = []
        self._seq, self._hash = -1, NO_HASH

    @property
    def head(self) -> str:
        rows = self.rows()
        return f"{self._seq}:{rows[-1].hash if rows else NO_HASH}"

    def shut(self) -> None:
        """Nothing is open."""

    def rows(self) -> list[Row]:
        for kind, content, time in self._entries[len(self._rows) :]:
            previous = self._rows[-1].hash if self._rows else NO_HASH
            self._rows.append(
                write_row(
                    kind,
                    content,
                    seq=len(self._rows),
                    previous=previous,
                    identity=self.identity,
                    time=time,
                )
            )
        return list(self._rows)

    def change(self) -> contextlib.AbstractContextManager[object]:
        # A ledger checks before it appends, so there is nothing to roll back.
        return self._lock

    def current(self) -> contextlib.AbstractContextManager[object]:
        return self._lock

    def append(self, kind: Kind, content: dict[str, Any]) -> int:
        self.apply(kind, content, datetime.now(UTC))
        return self._seq

    def apply(self, kind: Kind, content: dict[str, Any], time: datetime) -> None:
        self.state.apply({"seq": self._seq + 1, "kind": kind, **content})
        self._seq += 1
        self._entries.append((kind, content, time))

    def fresh(self) -> list[tuple[Kind, dict[str, Any], datetime]]:
        return self._entries[self.saved :]

    def mark_saved(self) -> None:
        self.saved = len(self._entries)


def _connect(file: Path) -> sqlite3.Connection:
    file.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("PRAGMA synchronous = OFF")
    connection.executescript(_SCHEMA)
    return connection


def _read(database: sqlite3.Connection, site: str) -> _MemoryJournal | None:
    found = database.execute("SELECT key FROM sites WHERE name = ?", (site,)).fetchone()
    if found is None:
        return None
    journal = _MemoryJournal(Identity(Ed25519PrivateKey.from_private_bytes(found[0])))
    entries = database.execute(
        "SELECT seq, kind, time, content FROM entries WHERE site = ? ORDER BY seq", (site,)
    )
    for number, (seq, kind, time, content) in enumerate(entries):
        if seq != number:
            raise LedgerCorrupt(f"entry {number} of simulated site {site} is missing")
        journal.apply(kind, json.loads(content), datetime.fromisoformat(time))
    journal.mark_saved()
    return journal


def _private_bytes(identity: Identity) -> bytes:
    if not isinstance(identity.key, Ed25519PrivateKey):
        raise TypeError("a site's identity is Ed25519")
    return identity.key.private_bytes_raw()
