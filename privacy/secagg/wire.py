"""Bytes of messages: written in one canonical form, read strictly.

Every message begins with a magic, the format's version, its kind, the digest that binds it to one
run, and a round. A reader refuses what is too short, too long, out of order or unknown; every
length follows from public facts, so that no byte of the sender's decides how much is allocated.
"""

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Final

from fedward.core.errors import UpdateRejected

MAGIC: Final = b"FWSA"
VERSION: Final = 1
DIGEST: Final = 32
HEADER: Final = len(MAGIC) + 2 + DIGEST + 4
MAX_ROUND: Final = 2**32 - 1


class Kind(IntEnum):
    """What a message is; the names are those of `messages`."""

    KEY = 1
    KEYS = 2
    SHARES_REQUEST = 3
    SHARES = 4
    ROUND = 5
    UPDATE = 6
    CONFIRM_REQUEST = 7
    CONFIRMATION = 8
    UNMASK_REQUEST = 9
    UNMASKING = 10


def header(kind: Kind, context: bytes, round_number: int = 0) -> bytes:
    """The first bytes of a message.

    Args:
        kind: What the message is.
        context: Digest of the terms before keys are agreed, of the key list after.
        round_number: The round it belongs to; 0 during key agreement.
    """
    return MAGIC + bytes((VERSION, kind)) + context + struct.pack("<I", round_number)


def bitmap(members: Iterable[int], size: int) -> bytes:
    """A set of site indices as `ceil(size / 8)` bytes, least significant bit first."""
    return sum(1 << member for member in members).to_bytes((size + 7) // 8, "little")


class Reader:
    """Reads one message from its first byte to its last.

    Args:
        data: The message.
        sender: Who sent it, for the error.

    Every method raises `UpdateRejected` on bytes that no honest sender writes.
    """

    def __init__(self, data: bytes | bytearray | memoryview, *, sender: str) -> None:
        self._data = memoryview(data).cast("B")
        self._sender = sender
        self._offset = 0

    def reject(self, reason: str) -> UpdateRejected:
        """The error to raise for this message."""
        return UpdateRejected(site=self._sender, reason=reason)

    def header(self, kind: Kind, context: bytes) -> int:
        """Check the header and return the round's number."""
        if bytes(self.view(len(MAGIC) + 2)) != MAGIC + bytes((VERSION, kind)):
            raise self.reject(f"not a {kind.name} message of format version {VERSION}")
        if bytes(self.view(DIGEST)) != context:
            raise self.reject("made for another study, run or list of keys")
        return self.u32()

    def view(self, size: int) -> memoryview:
        """The next `size` bytes, without a copy."""
        end = self._offset + size
        if end > len(self._data):
            raise self.reject("ends too early")
        view = self._data[self._offset : end]
        self._offset = end
        return view

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        return bytes(self.view(size))

    def u16(self) -> int:
        """An unsigned integer of two bytes, least significant byte first."""
        return int.from_bytes(self.view(2), "little")

    def u32(self) -> int:
        """An unsigned integer of four bytes, least significant byte first."""
        return int.from_bytes(self.view(4), "little")

    def index(self, size: int, *, above: int = -1) -> int:
        """A site's index below `size` and above the one before it in a sorted list."""
        index = self.u16()
        if not above < index < size:
            raise self.reject("names a site that does not exist, twice or out of order")
        return index

    def bitmap(self, size: int) -> frozenset[int]:
        """A set of site indices below `size`."""
        bits = int.from_bytes(self.view((size + 7) // 8), "little")
        if bits >> size:
            raise self.reject("names a site that does not exist")
        return frozenset(index for index in range(size) if bits >> index & 1)

    def end(self) -> None:
        """Check that nothing is left."""
        if self._offset != len(self._data):
            raise self.reject("goes on after its end")
