"""The ledger's file: SQLite, one transaction an entry, durable when it returns."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from fedward.core.errors import ConfigError, LedgerCorrupt
from fedward.privacy.ledger.records import Row

_BUSY_SECONDS = 60.0
_APPLICATION_ID = 0x46454457  # "FEDW"

# Triggers hold off a slip; the chain and the signatures hold off intent.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    seq INTEGER PRIMARY KEY, body BLOB NOT NULL, signature BLOB NOT NULL
) STRICT;
CREATE TRIGGER IF NOT EXISTS entries_never_change BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS entries_never_go BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END;
"""


def connect(
    path: Path | None, *, read_only: bool = False, durable: bool = True
) -> sqlite3.Connection:
    """Open a ledger's file, or a ledger in memory.

    Without `durable`, which is for simulated sites alone, what was written survives the process
    and not a power cut.

    The journal is a rollback journal, so the ledger is one file at rest and may lie on any file
    system; `synchronous = EXTRA` is FULL and flushes the folder too when the journal goes, without
    which a power cut could bring the journal back and take the last entry with it.

    Raises:
        ConfigError: The file cannot be made or opened.
        LedgerCorrupt: The file is not a ledger, or SQLite cannot read it.
    """
    if path is not None and not read_only:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ConfigError(
                f"cannot be written: {error.strerror}; the site's state folder must be the site's",
                file=str(path),
            ) from error
    try:
        connection = sqlite3.connect(
            ":memory:" if path is None else f"{path.resolve().as_uri()}?mode={_mode(path)}",
            uri=path is not None,
            isolation_level=None,
            timeout=_BUSY_SECONDS,
            check_same_thread=False,
        )
        connection.execute(f"PRAGMA synchronous = {'EXTRA' if durable else 'OFF'}")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
        else:
            with transaction(connection):
                for statement in _SCHEMA.split(";\n"):
                    connection.execute(f"{statement};" if "BEGIN" in statement else statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    except sqlite3.DatabaseError as error:
        raise LedgerCorrupt(f"{path} cannot be used as a ledger: {error}") from error
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Shut out every other writer, of this process and of others, until the block ends.

    What the block wrote is on disk when it is left; nothing of it is if the block raises.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # COMMIT may have failed half-way (disk full); then there is nothing to roll back.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Let every read of the block see the same entries, whatever others write meanwhile."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def append(connection: sqlite3.Connection, row: Row) -> None:
    """Add an entry, inside a transaction."""
    connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (row.seq, row.body, row.signature))


def rows(connection: sqlite3.Connection, *, after: int = -1) -> list[Row]:
    """The entries with a number above `after`, in order.

    Raises:
        LedgerCorrupt: SQLite cannot read the file.
    """
    try:
        found = connection.execute(
            "SELECT seq, body, signature FROM entries WHERE seq > ? ORDER BY seq", (after,)
        ).fetchall()
    except sqlite3.DatabaseError as error:
        raise LedgerCorrupt(f"the ledger's file cannot be read: {error}") from error
    return [Row(seq, bytes(body), bytes(signature)) for seq, body, signature in found]


def _mode(path: Path) -> str:
    """Even a reader has to be able to roll back what a killed writer left half-done."""
    return "rw" if os.access(path, os.W_OK) else "ro"
