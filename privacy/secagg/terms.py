"""The terms of secure aggregation in one run: who, how many, against whom."""

import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final, Literal

from fedward.core.canonical import digest_json
from fedward.core.identity import PublicIdentity
from fedward.privacy.secagg import graph

Adversary = Literal["malicious", "honest-but-curious"]

MIN_SITES: Final = 3
MAX_COMPLETE: Final = 64
MAX_SITES: Final = 4096
MAX_LENGTH: Final = 2**31
_KINDS: Final[Mapping[str, type]] = {
    "study": str,
    "run": str,
    "sites": dict,
    "length": int,
    "threshold": int,
    "min_sites": int,
    "adversary": str,
    "neighbors": int,
}
_HEX: Final = re.compile(r"[0-9a-f]+")


def least_threshold(holders: int, adversary: Adversary) -> int:
    """The smallest threshold that is safe for shares among `holders` sites.

    More than half against a coordinator that keeps to the protocol. Against one that does not,
    floor(2n/3) + 1: then two disjoint groups of honest sites, each helped by the same fewer than
    n/3 dishonest ones, cannot both reach it (Bonawitz et al. 2017, section 6.2).
    """
    return holders // 2 + 1 if adversary == "honest-but-curious" else 2 * holders // 3 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all sites and the coordinator of a run agree on; its digest binds every message.

    Attributes:
        study: The study's hash, 64 hexadecimal digits.
        run: Which run of it, hexadecimal; never used twice.
        sites: The consortium's roster: each site's name and its identity's fingerprint.
        length: Number of uint32 of a site's vector.
        threshold: Sites needed to unmask; of each site's share holders.
        min_sites: Fewest sites in a sum.
        adversary: Whom the protocol withstands. A malicious coordinator needs the complete graph.
        neighbors: How many other sites a site shares masks with; all of them, up to 64 sites.
    """

    study: str
    run: str
    sites: Mapping[str, str]
    length: int
    threshold: int
    min_sites: int
    adversary: Adversary
    neighbors: int

    def __post_init__(self) -> None:
        """Check the terms. Raises `ValueError` with what is allowed."""
        count = len(self.sites)
        if not MIN_SITES <= count <= MAX_SITES:
            raise ValueError(f"secure aggregation is for {MIN_SITES} to {MAX_SITES} sites")
        if not MIN_SITES <= self.min_sites <= count:
            raise ValueError(f"min_sites must be {MIN_SITES} to the number of sites, {count}")
        if not 1 <= self.length <= MAX_LENGTH:
            raise ValueError(f"length must be 1 to {MAX_LENGTH}")
        if self.adversary not in ("malicious", "honest-but-curious"):
            raise ValueError('adversary must be "malicious" or "honest-but-curious"')
        self._check_graph(count)
        least = least_threshold(self.neighbors + 1, self.adversary)
        if not least <= self.threshold <= self.neighbors + 1:
            raise ValueError(f"threshold must be {least} to {self.neighbors + 1}")
        if not (_HEX.fullmatch(self.study) and _HEX.fullmatch(self.run)):
            raise ValueError("study and run must be hexadecimal")

    def _check_graph(self, count: int) -> None:
        if self.complete:
            if count > MAX_COMPLETE:
                raise ValueError(f"the complete graph is for up to {MAX_COMPLETE} sites")
        elif self.adversary == "malicious":
            raise ValueError("a malicious coordinator is withstood on the complete graph only")
        elif self.neighbors not in range(2, count - 1, 2):
            raise ValueError("neighbors must be even, or the number of other sites")

    @classmethod
    def propose(
        cls,
        *,
        study: str,
        roster: Mapping[str, PublicIdentity],
        length: int,
        min_sites: int = MIN_SITES,
        adversary: Adversary = "malicious",
        threshold: int | None = None,
        neighbors: int | None = None,
    ) -> "Terms":
        """Terms of a new run with the smallest safe threshold, unless a larger one is given."""
        others = len(roster) - 1 if neighbors is None else neighbors
        return cls(
            study=study,
            run=secrets.token_hex(16),
            sites={name: roster[name].fingerprint for name in sorted(roster)},
            length=length,
            threshold=least_threshold(others + 1, adversary) if threshold is None else threshold,
            min_sites=min_sites,
            adversary=adversary,
            neighbors=others,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names in order; a site's index in messages is its place here."""
        return tuple(sorted(self.sites))

    @property
    def complete(self) -> bool:
        """Whether every site shares masks with every other."""
        return self.neighbors == len(self.sites) - 1

    @property
    def fewest(self) -> int:
        """The fewest sites that a sum may hold."""
        return max(self.min_sites, self.threshold)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the terms' canonical form."""
        return bytes.fromhex(digest_json({"secure aggregation": 1, **self.to_json()}))

    def to_json(self) -> dict[str, object]:
        """The terms as JSON values."""
        return {
            "study": self.study,
            "run": self.run,
            "sites": dict(self.sites),
            "length": self.length,
            "threshold": self.threshold,
            "min_sites": self.min_sites,
            "adversary": self.adversary,
            "neighbors": self.neighbors,
        }

    @classmethod
    def from_json(cls, value: object) -> "Terms":
        """Read what `to_json` wrote, from whoever proposes it.

        Raises:
            ValueError: A key is missing or unknown, or a value has another type or is not allowed.
        """
        kinds = {field.name: _KINDS[field.name] for field in fields(cls)}
        if not isinstance(value, dict) or set(value) != set(kinds):
            raise ValueError(f"terms have exactly the keys {', '.join(kinds)}")
        for name, kind in kinds.items():
            if type(value[name]) is not kind:
                raise ValueError(f"{name} of the terms must be of type {kind.__name__}")
        if not all(type(k) is str and type(v) is str for k, v in value["sites"].items()):
            raise ValueError("sites of the terms must map names to fingerprints")
        return cls(**value)

    def matches(self, roster: Mapping[str, PublicIdentity]) -> bool:
        """Whether the sites are exactly those of a roster, with the identities pinned there."""
        pinned = {name: identity.fingerprint for name, identity in roster.items()}
        return pinned == dict(self.sites)

    def holders(self, members: frozenset[int], key: bytes) -> dict[int, tuple[int, ...]]:
        """Who holds the shares of whom: each member's neighbours and itself, in order.

        Args:
            members: The sites whose keys are known.
            key: Digest of the key list, which decides the order on the ring.
        """
        if self.complete or len(members) <= self.neighbors + 1:
            everyone = tuple(sorted(members))
            return dict.fromkeys(everyone, everyone)
        ring = sorted(members, key=lambda m: hmac.digest(key, m.to_bytes(2, "little"), "sha256"))
        return graph.ring_holders(ring, self.neighbors)
