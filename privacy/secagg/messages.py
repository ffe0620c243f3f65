"""The messages between a site and the coordinator, as frozen values that write and read bytes.

Sites appear as indices in the terms' sorted names. Readers raise `UpdateRejected`.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.secagg.keys import COMMITMENT, SIZE, TAG
from fedward.privacy.secagg.wire import DIGEST, HEADER, Kind, Reader, bitmap, header

Data = bytes | bytearray | memoryview

SIGNATURE: Final = 64
PIECE: Final = 2 * SIZE + TAG  # a holder's two shares, sealed
MAX_AHEAD: Final = 64
_ALIGNMENT: Final = 16


@dataclass(frozen=True, slots=True)
class Key:
    """A site's public key for this run, signed with its identity."""

    site: int
    public: bytes
    signature: bytes

    @staticmethod
    def statement(terms: bytes, site: int, public: bytes) -> bytes:
        """What the identity signs."""
        return b"fedward secagg key 1\0" + terms + struct.pack("<H", site) + public

    def encode(self, terms: bytes) -> bytes:
        """As bytes."""
        return header(Kind.KEY, terms) + self.body()

    def body(self) -> bytes:
        """As bytes without a header, as it stands in a list."""
        return struct.pack("<H", self.site) + self.public + self.signature

    @classmethod
    def decode(cls, data: Data, *, terms: bytes, sites: int, sender: str) -> "Key":
        """Read."""
        reader = Reader(data, sender=sender)
        reader.header(Kind.KEY, terms)
        key = cls(reader.index(sites), reader.take(SIZE), reader.take(SIGNATURE))
        reader.end()
        return key


@dataclass(frozen=True, slots=True)
class Keys:
    """All keys that came in time. The digest of these bytes binds everything after."""

    keys: tuple[Key, ...]
    ahead: int

    def encode(self, terms: bytes) -> bytes:
        """As bytes."""
        head = header(Kind.KEYS, terms) + struct.pack("<HH", self.ahead, len(self.keys))
        return head + b"".join(key.body() for key in self.keys)

    @classmethod
    def decode(cls, data: Data, *, terms: bytes, sites: int, sender: str) -> "Keys":
        """Read."""
        reader = Reader(data, sender=sender)
        reader.header(Kind.KEYS, terms)
        ahead = reader.u16()
        if not 1 <= ahead <= MAX_AHEAD:
            raise reader.reject(f"asks shares for {ahead} rounds; 1 to {MAX_AHEAD} are allowed")
        keys: list[Key] = []
        for _ in range(reader.u16()):
            above = keys[-1].site if keys else -1
            index = reader.index(sites, above=above)
            keys.append(Key(index, reader.take(SIZE), reader.take(SIGNATURE)))
        reader.end()
        return cls(tuple(keys), ahead)


@dataclass(frozen=True, slots=True)
class SharesRequest:
    """Asks a site for its shares of `count` rounds from `first` on."""

    first: int
    count: int

    def encode(self, context: bytes) -> bytes:
        """As bytes."""
        return header(Kind.SHARES_REQUEST, context, self.first) + struct.pack("<H", self.count)

    @classmethod
    def decode(cls, data: Data, *, context: bytes, sender: str) -> "SharesRequest":
        """Read."""
        reader = Reader(data, sender=sender)
        first = reader.header(Kind.SHARES_REQUEST, context)
        request = cls(first, reader.u16())
        reader.end()
        if not (request.first >= 1 and 1 <= request.count <= MAX_AHEAD):
            raise reader.reject(f"asks for too many rounds; {MAX_AHEAD} at a time are allowed")
        return request


@dataclass(frozen=True, slots=True)
class RoundShares:
    """A site's two secrets of one round, for the others to hold.

    Attributes:
        seeds: The site's pair seeds of the round, one for each other holder in order, sealed with
            the round's recovery key.
        pieces: For each holder in order, its shares of the self-mask seed and of the recovery
            key, sealed for that holder.
        commitments: For each holder, digests of the two shares.
    """

    seeds: bytes
    pieces: tuple[bytes, ...]
    commitments: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Shares:
    """A site's shares of some rounds, for the coordinator to keep until they are needed."""

    site: int
    first: int
    rounds: tuple[RoundShares, ...]

    def encode(self, context: bytes) -> bytes:
        """As bytes."""
        parts = [header(Kind.SHARES, context, self.first)]
        parts.append(struct.pack("<HH", self.site, len(self.rounds)))
        for shares in self.rounds:
            parts.append(shares.seeds)
            parts.extend(shares.pieces)
            parts.extend(digest for pair in shares.commitments for digest in pair)
        return b"".join(parts)

    @staticmethod
    def size(holders: int, count: int) -> int:
        """Length in bytes of the shares of `count` rounds."""
        each = (holders - 1) * SIZE + TAG + holders * (PIECE + 2 * COMMITMENT)
        return HEADER + 4 + count * each

    @classmethod
    def decode(
        cls, data: Data, *, context: bytes, holders: Mapping[int, tuple[int, ...]], sender: str
    ) -> "Shares":
        """Read; `holders` says how many shares each site makes."""
        reader = Reader(data, sender=sender)
        first = reader.header(Kind.SHARES, context)
        site, count = reader.u16(), reader.u16()
        if site not in holders or first < 1 or not 1 <= count <= MAX_AHEAD:
            raise reader.reject("names a site without a key, or too many rounds")
        width = len(holders[site])
        rounds = tuple(
            RoundShares(
                reader.take((width - 1) * SIZE + TAG),
                tuple(reader.take(PIECE) for _ in range(width)),
                tuple((reader.take(COMMITMENT), reader.take(COMMITMENT)) for _ in range(width)),
            )
            for _ in range(count)
        )
        reader.end()
        return cls(site, first, rounds)


@dataclass(frozen=True, slots=True)
class Round:
    """Opens a round: who takes part, and the later rounds whose shares the reply shall carry."""

    round_number: int
    participants: frozenset[int]
    first: int = 0
    count: int = 0

    def encode(self, context: bytes, *, sites: int) -> bytes:
        """As bytes."""
        head = header(Kind.ROUND, context, self.round_number)
        return head + bitmap(self.participants, sites) + struct.pack("<IH", self.first, self.count)

    @classmethod
    def decode(cls, data: Data, *, context: bytes, sites: int, sender: str) -> "Round":
        """Read."""
        reader = Reader(data, sender=sender)
        number = reader.header(Kind.ROUND, context)
        request = cls(number, reader.bitmap(sites), reader.u32(), reader.u16())
        reader.end()
        if number < 1 or request.count > MAX_AHEAD or (request.count > 0) != (request.first > 0):
            raise reader.reject("a round is 1 or more and asks for a bounded number of shares")
        return request


@dataclass(frozen=True, slots=True)
class Update:
    """A site's masked vector, and its signature on who takes part.

    Attributes:
        round_number: The round.
        site: Who sends it.
        signature: On the statement that all participants survive; see `confirmation`.
        shares: A `Shares` message for later rounds, or nothing.
        vector: Shape `(length,)`.
    """

    round_number: int
    site: int
    signature: bytes
    shares: bytes
    vector: NDArray[np.uint32]

    @staticmethod
    def start(
        context: bytes,
        *,
        round_number: int,
        site: int,
        signature: bytes,
        shares: bytes,
        length: int,
    ) -> tuple[memoryview, NDArray[np.uint32]]:
        """The message, and the vector in it, which is still to be filled in place."""
        head = header(Kind.UPDATE, context, round_number) + struct.pack("<H", site) + signature
        head += struct.pack("<I", len(shares)) + shares
        head += bytes(-len(head) % _ALIGNMENT)
        # NumPy asks for huge pages: of a bytearray, touching every page takes longer than masking.
        message = np.empty(len(head) + 4 * length, dtype=np.uint8)
        message[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        return message.data, message[len(head) :].view("<u4")

    @classmethod
    def decode(
        cls, data: Data, *, context: bytes, sites: int, length: int, longest: int, sender: str
    ) -> "Update":
        """Read, without a copy of the vector; `longest` is the most bytes of shares allowed."""
        reader = Reader(data, sender=sender)
        number = reader.header(Kind.UPDATE, context)
        site, signature, size = reader.index(sites), reader.take(SIGNATURE), reader.u32()
        if size > longest:
            raise reader.reject("carries more shares than were asked for")
        shares = reader.take(size)
        if any(reader.take(-(HEADER + 2 + SIGNATURE + 4 + size) % _ALIGNMENT)):
            raise reader.reject("padding must be zero")
        vector = np.frombuffer(reader.view(4 * length), dtype="<u4")
        reader.end()
        return cls(number, site, signature, shares, vector)


def confirmation(
    context: bytes,
    round_number: int,
    participants: frozenset[int],
    survivors: frozenset[int],
    *,
    sites: int,
) -> bytes:
    """The statement that a site signs: these take part in the round, and these survive it."""
    return (
        b"fedward secagg survivors 1\0"
        + context
        + struct.pack("<I", round_number)
        + bitmap(participants, sites)
        + bitmap(survivors, sites)
    )


@dataclass(frozen=True, slots=True)
class ConfirmRequest:
    """Tells a site who survives, before anything is unmasked."""

    round_number: int
    survivors: frozenset[int]

    def encode(self, context: bytes, *, sites: int) -> bytes:
        """As bytes."""
        return header(Kind.CONFIRM_REQUEST, context, self.round_number) + bitmap(
            self.survivors, sites
        )

    @classmethod
    def decode(cls, data: Data, *, context: bytes, sites: int, sender: str) -> "ConfirmRequest":
        """Read."""
        reader = Reader(data, sender=sender)
        request = cls(reader.header(Kind.CONFIRM_REQUEST, context), reader.bitmap(sites))
        reader.end()
        return request


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A site's signature on who survives."""

    round_number: int
    site: int
    signature: bytes

    def encode(self, context: bytes) -> bytes:
        """As bytes."""
        head = header(Kind.CONFIRMATION, context, self.round_number)
        return head + struct.pack("<H", self.site) + self.signature

    @classmethod
    def decode(cls, data: Data, *, context: bytes, sites: int, sender: str) -> "Confirmation":
        """Read."""
        reader = Reader(data, sender=sender)
        number = reader.header(Kind.CONFIRMATION, context)
        reply = cls(number, reader.index(sites), reader.take(SIGNATURE))
        reader.end()
        return reply


@dataclass(frozen=True, slots=True)
class UnmaskRequest:
    """Asks a site for its shares: of the survivors' self-masks, of the others' recovery keys.

    Attributes:
        round_number: The round.
        survivors: Whose vectors are in the sum.
        signatures: Of survivors, on that statement.
        pieces: For this site, what each participant sealed for it.
    """

    round_number: int
    survivors: frozenset[int]
    signatures: Mapping[int, bytes]
    pieces: Mapping[int, bytes]

    def encode(self, context: bytes, *, sites: int) -> bytes:
        """As bytes."""
        parts = [header(Kind.UNMASK_REQUEST, context, self.round_number)]
        parts.append(bitmap(self.survivors, sites))
        for entries in (self.signatures, self.pieces):
            parts.append(struct.pack("<H", len(entries)))
            parts.extend(struct.pack("<H", site) + entries[site] for site in sorted(entries))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: Data, *, context: bytes, sites: int, sender: str) -> "UnmaskRequest":
        """Read."""
        reader = Reader(data, sender=sender)
        number = reader.header(Kind.UNMASK_REQUEST, context)
        survivors = reader.bitmap(sites)
        signatures = _entries(reader, sites, SIGNATURE)
        request = cls(number, survivors, signatures, _entries(reader, sites, PIECE))
        reader.end()
        return request


@dataclass(frozen=True, slots=True)
class Unmasking:
    """A site's shares: one for each participant whose piece it could open."""

    round_number: int
    site: int
    shares: Mapping[int, bytes]

    def encode(self, context: bytes) -> bytes:
        """As bytes."""
        parts = [header(Kind.UNMASKING, context, self.round_number)]
        parts.append(struct.pack("<HH", self.site, len(self.shares)))
        parts.extend(struct.pack("<H", site) + self.shares[site] for site in sorted(self.shares))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: Data, *, context: bytes, sites: int, sender: str) -> "Unmasking":
        """Read."""
        reader = Reader(data, sender=sender)
        number = reader.header(Kind.UNMASKING, context)
        reply = cls(number, reader.index(sites), _entries(reader, sites, SIZE))
        reader.end()
        return reply


def _entries(reader: Reader, sites: int, size: int) -> dict[int, bytes]:
    """A sorted list of one value of `size` bytes for each of some sites."""
    entries: dict[int, bytes] = {}
    above = -1
    for _ in range(reader.u16()):
        above = reader.index(sites, above=above)
        entries[above] = reader.take(size)
    return entries


__all__ = [
    "DIGEST",
    "MAX_AHEAD",
    "PIECE",
    "SIGNATURE",
    "ConfirmRequest",
    "Confirmation",
    "Key",
    "Keys",
    "Round",
    "RoundShares",
    "Shares",
    "SharesRequest",
    "UnmaskRequest",
    "Unmasking",
    "Update",
    "confirmation",
]
