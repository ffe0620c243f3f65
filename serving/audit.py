"""The audit log: who asked what of which version, chained so that a change is located.

One JSON object a line; each holds the SHA-256 of the line before and its own. Lines are written
and flushed to disk in groups by a thread, so that no request waits for the disk: a power cut
loses at most the last group. It never holds a patient's value, but sealed by
`vault` where the hospital asks for that.

The chain shows what was changed, inserted, removed or reordered inside the file. Cutting lines
off its end shows against any head written down elsewhere: `head` is in the metrics and on the page.
"""

import json
import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedward.core.canonical import digest
from fedward.core.errors import FedwardError
from fedward.serving.vault import Values, Vault, VaultError, bound

_LOG = logging.getLogger("fedward.serving")
_GENESIS = "0" * 64
# One encoder for all lines: making it anew costs more than a line.
_ENCODE = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode
_Fact = str | float | None
_Facts = tuple[tuple[str, _Fact], ...]
# When, what by name, and a patient's id and values where they are kept.
_Entry = tuple[float, _Facts | str, tuple[str, Values] | None]
_TAIL_LENGTH = len(b',"hash":"' + _GENESIS.encode() + b'"}\n')
_GROUP_SECONDS = 0.05


class AuditCorrupt(FedwardError):
    """An audit log does not verify.

    Args:
        file: The log.
        line: The first line that is wrong, from 1.
        reason: What is wrong with it.
    """

    def __init__(self, *, file: Path, line: int, reason: str) -> None:
        self.line = line
        super().__init__(f"{file}, line {line}: {reason}; compare with a backup")


class AuditLog:
    """Appends to one file. Close it, or use it as a context, to flush the last group.

    Args:
        file: Made if missing; verified if not.
        vault: Seals patients' values; None keeps none.

    Raises:
        AuditCorrupt: The file does not verify. A torn last line of a crash is cut off.
    """

    def __init__(self, file: Path, *, vault: Vault | None = None) -> None:
        self._vault = vault
        file.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(file)
        self._number, self._head = verify_log(file)
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        # Appending to a deque is atomic: a request takes no lock.
        self._waiting: deque[_Entry | threading.Event] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._writer = threading.Thread(target=self._write_groups, name="audit", daemon=True)
        self._writer.start()

    def __enter__(self) -> "AuditLog":
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Flush and close."""
        self.close()

    @property
    def head(self) -> str:
        """The hash of the last line on disk, 64 hexadecimal digits."""
        return self._head

    def append(
        self, action: str, *, patient: tuple[str, Values] | None = None, **facts: _Fact
    ) -> None:
        """Record an action; returns at once.

        Args:
            action: What was done, one word.
            patient: Their id and values: sealed with the log's vault, and left out without one.
            facts: Who, model, version, status; never a patient's value.
        """
        kept = None if self._vault is None else patient
        self._waiting.append((time.time(), (("action", action), *facts.items()), kept))
        if not self._wake.is_set():
            self._wake.set()

    def append_again(self, start: str) -> None:
        """Record what was recorded before, as `start_of` has put it."""
        self._waiting.append((time.time(), start, None))
        if not self._wake.is_set():
            self._wake.set()

    def flush(self) -> None:
        """Return once all that was appended before is on disk."""
        done = threading.Event()
        self._waiting.append(done)
        self._wake.set()
        while not done.wait(_GROUP_SECONDS) and self._writer.is_alive():
            pass

    def close(self) -> None:
        """Write what waits and stop."""
        self._closing = True
        self._wake.set()
        self._writer.join()
        os.close(self._descriptor)

    def _write_groups(self) -> None:
        while True:
            self._wake.wait()
            if not self._closing:
                time.sleep(_GROUP_SECONDS)  # let a group gather
            # Before looking: what is appended or asked from here on wakes us again.
            self._wake.clear()
            closing = self._closing
            group = [self._waiting.popleft() for _ in range(len(self._waiting))]
            self._write([entry for entry in group if not isinstance(entry, threading.Event)])
            for entry in group:
                if isinstance(entry, threading.Event):
                    entry.set()
            if closing:
                return

    def _write(self, group: list[_Entry]) -> None:
        if not group:
            return
        lines = []
        number, head = self._number, self._head
        for entry in group:
            number += 1
            line, head = _line(self._sealed(entry), number=number, before=head)
            lines.append(line)
        data = memoryview(b"".join(lines))
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fdatasync(self._descriptor)
        self._number, self._head = number, head

    def _sealed(self, entry: _Entry) -> _Entry:
        """With the patient's values sealed: off the event loop, as a new key goes to disk."""
        when, facts, patient = entry
        if patient is None or self._vault is None or isinstance(facts, str):
            return entry
        try:
            sealed = self._vault.seal(*patient, line=bound(dict(facts)))
        except (VaultError, sqlite3.Error, OSError) as error:
            # The line is what must not be lost.
            _LOG.error("a patient's values were not kept: %s", type(error).__name__)
            sealed = {"values": "not kept"}
        return when, (*facts, *sealed.items()), None


def verify_log(file: Path) -> tuple[int, str]:
    """Check a whole log.

    Returns:
        The number of lines and the hash of the last.

    Raises:
        AuditCorrupt: The first line that was changed, inserted, removed or moved.
    """
    number, head = 0, _GENESIS
    if not file.exists():
        return number, head
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            body, stated = line[:-_TAIL_LENGTH] + b"}", line[-_TAIL_LENGTH:]
            now = digest(body)
            if stated != _tail(now):
                raise AuditCorrupt(file=file, line=number, reason="was changed")
            entry = json.loads(body)  # its digest says that we wrote it
            if entry.get("before") != head or entry.get("number") != number:
                raise AuditCorrupt(file=file, line=number, reason="does not follow the one before")
            head = now
    return number, head


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """A log's lines. Verify it first."""
    with file.open("rb") as lines:
        for line in lines:
            yield json.loads(line)


def _line(entry: _Entry, *, number: int, before: str) -> tuple[bytes, str]:
    """A line and its hash, which is of the line without it."""
    when, facts, _ = entry
    start = facts if isinstance(facts, str) else _facts(facts)
    body = f'{start},"time":{when!r},"number":{number},"before":"{before}"}}'.encode()
    own = digest(body)
    return body[:-1] + _tail(own), own


def start_of(action: str, **facts: _Fact) -> str:
    """How the line of an action begins, for `AuditLog.append_again`."""
    return _facts((("action", action), *facts.items()))


@lru_cache(maxsize=256)
def _facts(facts: tuple[tuple[str, _Fact], ...]) -> str:
    """The start of a line: the same for most requests, and a third of what a line costs."""
    return _ENCODE(dict(facts)).removesuffix("}")


def _tail(own: str) -> bytes:
    return b',"hash":"' + own.encode() + b'"}\n'


def _cut_torn_line(file: Path) -> None:
    """Remove what a power cut left of a line: without its end, nobody was told it was kept."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)
