"""Patients' values in the audit log, where a hospital asks for them: sealed, and erasable.

A line holds the values under AES-256-GCM, with a key of that one patient's own and a random token
in place of the id. The keys are in `STORE/state/vault.db`, themselves sealed under a master key in
`STORE/state/vault.key` that is replaced from time to time. Erasing a patient destroys their key and
their token: the lines stay, so that the log's chain still verifies, and say nothing any more.

What a backup of `vault.db` and `vault.key` together holds, it holds: keep them out of the log's.
"""

import base64
import contextlib
import hmac
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedward.core.errors import FedwardError
from fedward.core.files import write_atomic

ROTATE_AFTER = 90 * 86400.0  # seconds
_KEY_BYTES, _NONCE_BYTES = 32, 12
_TABLE = """CREATE TABLE IF NOT EXISTS patients (
    pseudonym BLOB PRIMARY KEY, token TEXT UNIQUE NOT NULL, sealed BLOB NOT NULL
) WITHOUT ROWID"""

Values = Mapping[str, float | None]


class VaultError(FedwardError):
    """The vault's files do not belong together, or were changed."""


class Vault:
    """The keys of patients. Any thread may use it, and another process at the same time.

    Args:
        folder: Of `vault.db` and `vault.key`, made if missing.

    Raises:
        VaultError: The key is missing and the database is not, or it is malformed.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._key_file = folder / "vault.db", folder / "vault.key"
        self._lock = threading.Lock()
        if not self._key_file.exists():
            if self._file.exists():
                raise VaultError(f"{self._key_file} is missing; restore it, or remove {self._file}")
            self._write_master(_new_master(index=secrets.token_hex(_KEY_BYTES)))
        self._file.touch(mode=0o600)
        with self._database() as database:
            database.execute(_TABLE)

    def seal(self, patient: str, values: Values, *, line: str) -> dict[str, str]:
        """What a line of the log holds of a patient.

        Args:
            patient: The id, as the hospital knows it.
            values: By field; None is missing.
            line: What the values are bound to: they open with the same words only.

        Returns:
            `patient`, a token, and `values`, sealed.
        """
        with self._database() as database:
            token, key = self._key_of(database, patient)
        plain = json.dumps(dict(values), separators=(",", ":"), allow_nan=False).encode()
        return {"patient": token, "values": _pack(key, plain, _bound(token, line))}

    def show(self, patient: str, lines: Iterator[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A patient's lines of the log, opened; none if they were erased or never there.

        Raises:
            VaultError: A line was changed.
        """
        with self._database() as database:
            row = self._find(database, patient)
            if row is None:
                return []
            token, key = row
        return [
            {**line, "values": json.loads(_unpack(key, line["values"], _bound(token, bound(line))))}
            for line in lines
            if line.get("patient") == token
        ]

    def erase(self, patient: str) -> bool:
        """Destroy a patient's key. Whether there was one."""
        with self._database() as database:
            pseudonym = self._pseudonym(self._master(), patient)
            done = database.execute("DELETE FROM patients WHERE pseudonym = ?", (pseudonym,))
            return done.rowcount > 0

    def rotate(self, *, after: float = 0.0) -> bool:
        """Seal every patient's key under a new master key, if the old is older than `after` s."""
        if time.time() - float(self._master()["made"]) < after:
            return False
        with self._database() as database:
            old = self._master()
            new = _new_master(index=old["index"])
            for pseudonym, token, sealed in database.execute("SELECT * FROM patients").fetchall():
                key = self._open_key(old, sealed, token)
                again = _seal(bytes.fromhex(new["key"]), key, token.encode())
                database.execute(
                    "UPDATE patients SET sealed = ? WHERE pseudonym = ?", (again, pseudonym)
                )
            # Both in the file until the database has changed over: a crash loses no key.
            self._write_master({**new, "before": old["key"]})
        self._write_master(new)
        return True

    def _key_of(self, database: sqlite3.Connection, patient: str) -> tuple[str, bytes]:
        found = self._find(database, patient)
        if found is not None:
            return found
        master = self._master()
        token, key = secrets.token_hex(16), secrets.token_bytes(_KEY_BYTES)
        sealed = _seal(bytes.fromhex(master["key"]), key, token.encode())
        pseudonym = self._pseudonym(master, patient)
        database.execute("INSERT INTO patients VALUES (?, ?, ?)", (pseudonym, token, sealed))
        return token, key

    def _find(self, database: sqlite3.Connection, patient: str) -> tuple[str, bytes] | None:
        master = self._master()
        query = "SELECT token, sealed FROM patients WHERE pseudonym = ?"
        row = database.execute(query, (self._pseudonym(master, patient),)).fetchone()
        if row is None:
            return None
        token, sealed = row
        return token, self._open_key(master, sealed, token)

    def _open_key(self, master: Mapping[str, Any], sealed: bytes, token: str) -> bytes:
        for name in ("key", "before"):  # the latter after a crash while it was replaced
            with contextlib.suppress(VaultError, KeyError):
                return _open(bytes.fromhex(master[name]), sealed, token.encode())
        raise VaultError(f"{self._key_file} is not the key of {self._file}; restore both together")

    @staticmethod
    def _pseudonym(master: Mapping[str, Any], patient: str) -> bytes:
        return hmac.digest(bytes.fromhex(master["index"]), patient.encode(), "sha256")

    def _master(self) -> dict[str, Any]:
        try:
            value = json.loads(self._key_file.read_bytes())
            return {**value, "index": value["index"], "key": value["key"], "made": value["made"]}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise VaultError(f"{self._key_file} cannot be read; restore it") from error

    def _write_master(self, value: Mapping[str, Any]) -> None:
        write_atomic(self._key_file, json.dumps(value), mode=0o600)

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """One transaction, alone in all processes and on disk at its end."""
        with self._lock:
            database = sqlite3.connect(self._file, timeout=30, isolation_level=None)
            try:
                database.execute("PRAGMA secure_delete = ON")
                database.execute("PRAGMA synchronous = FULL")
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
            finally:
                database.close()  # rolls back what was not committed


def bound(line: Mapping[str, Any]) -> str:
    """What the values of a line of the log are bound to."""
    return f"{line['action']}/{line['model']}/{line['version']}"


def _new_master(*, index: str) -> dict[str, Any]:
    return {"key": secrets.token_hex(_KEY_BYTES), "index": index, "made": time.time()}


def _bound(token: str, line: str) -> bytes:
    return f"{token}/{line}".encode()


def _seal(key: bytes, plain: bytes, about: bytes) -> bytes:
    nonce = secrets.token_bytes(_NONCE_BYTES)  # random: 2**32 lines of one patient are far away
    return nonce + AESGCM(key).encrypt(nonce, plain, about)


def _open(key: bytes, sealed: bytes, about: bytes) -> bytes:
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        raise VaultError("what is sealed does not open; compare with a backup") from error


def _pack(key: bytes, plain: bytes, about: bytes) -> str:
    return base64.b64encode(_seal(key, plain, about)).decode()


def _unpack(key: bytes, packed: str, about: bytes) -> bytes:
    return _open(key, base64.b64decode(packed), about)
