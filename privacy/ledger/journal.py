"""The ledger's entries, kept in step with the file between threads and processes."""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

from fedward.core.errors import ConfigError, LedgerCorrupt, PrivacyError
from fedward.core.identity import Identity, PublicIdentity
from fedward.privacy.ledger import storage
from fedward.privacy.ledger.records import NO_HASH, Kind, Row, read_row, sign_row, write_body
from fedward.privacy.ledger.state import State


class Journal:
    """Entries on disk and the accounts that they add up to.

    Attributes:
        name: What errors call the file.
        public: The key that signs.
        state: The accounts; valid inside `change` and `current`.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        public: PublicIdentity,
        identity: Identity | None,
        durable: bool = True,
    ) -> None:
        """Open the file, or make it; see `storage.connect` for `durable`.

        Without an `identity` nothing can be written.
        """
        self.name = "the ledger in memory" if path is None else str(path)
        self._public = public
        self.state = State()
        self._identity = identity
        self._connection = storage.connect(path, read_only=identity is None, durable=durable)
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._seq, self._hash = -1, NO_HASH

    @property
    def public(self) -> PublicIdentity:
        """The key that signs."""
        return self._public

    @property
    def head(self) -> str:
        """Number and digest of the last entry that was taken in."""
        return f"{self._seq}:{self._hash}"

    def shut(self) -> None:
        """Close the file."""
        self._connection.close()

    def rows(self) -> list[Row]:
        """All entries, as they are in the file now."""
        with self._lock:
            return storage.rows(self._connection)

    def change(self) -> contextlib.AbstractContextManager[object]:
        """One exclusive transaction, which starts from what is in the file now.

        Raises:
            PrivacyError: The file cannot be written: the disk is full, or somebody holds it.
        """
        return self._change()

    def current(self) -> contextlib.AbstractContextManager[object]:
        """A look at what is in the file now."""
        return self._current()

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock:
            self._stay_home()
            self._signer()
            try:
                with storage.transaction(self._connection):
                    self._take_in()
                    yield
            except LedgerCorrupt:
                self._forget()
                raise
            except sqlite3.Error as error:
                # Whether the entry was written is not known: the file says, next time.
                self._forget()
                raise PrivacyError(
                    f"{self.name} cannot be written ({error}), so nothing was released; make room "
                    "on its disk, or stop what else has it open, and try again"
                ) from error

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        with self._lock:
            self._stay_home()
            with storage.snapshot(self._connection):
                self._take_in()
                yield

    def append(self, kind: Kind, content: dict[str, Any]) -> int:
        """Write the next entry, inside `change`; it is applied as one read from the file is."""
        seq = self._seq + 1
        body = write_body(kind, content, seq=seq, previous=self._hash)
        row = sign_row(seq, body, self._signer())
        self._apply(row)
        storage.append(self._connection, row)
        return row.seq

    def begin(self, site: str, *, simulated: bool) -> None:
        """Write the first entry, or check that it is this site's. Raises `ConfigError`."""
        with self.change():
            if self._seq < 0:
                self.append(
                    "genesis",
                    {
                        "site": site,
                        "simulated": simulated,
                        "key": self.public.pem().decode(),
                        "ledger": token_hex(16),
                    },
                )
        genesis = self.state.genesis
        if genesis["key"] != self.public.pem().decode():
            raise ConfigError(
                "is signed by another key; use the identity that the ledger began with",
                file=self.name,
            )
        if (genesis["site"], genesis["simulated"]) != (site, simulated):
            kind = "simulated" if genesis["simulated"] else "real"
            raise ConfigError(
                f"is the ledger of the {kind} site {genesis['site']}; give each site its own "
                "[site] state folder",
                file=self.name,
            )

    def _apply(self, row: Row) -> None:
        self.state.apply(read_row(row, seq=self._seq + 1, previous=self._hash))
        self._seq, self._hash = row.seq, row.hash

    def _signer(self) -> Identity:
        if self._identity is None:
            raise ValueError("this ledger was opened to be read")
        return self._identity

    def _forget(self) -> None:
        self.state, self._seq, self._hash = State(), -1, NO_HASH

    def _take_in(self) -> None:
        """Apply the entries that others have written since."""
        rows = storage.rows(self._connection, after=self._seq - 1)
        if self._seq >= 0:
            if not rows or rows[0].hash != self._hash:
                raise LedgerCorrupt(
                    f"entry {self._seq} of {self.name} was there and is not any more: the file "
                    "was replaced by another or an older one"
                )
            rows = rows[1:]
        for row in rows:
            self._apply(row)

    def _stay_home(self) -> None:
        if os.getpid() != self._process:
            raise ValueError("a ledger must not be carried over a fork; open it in the child")
