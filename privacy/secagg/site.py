"""A site's side of secure aggregation: messages in, messages out.

Steps and proofs after Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving
Machine Learning", CCS 2017, figure 4; what differs is argued in docs/secure-aggregation.md.
Everything is checked before anything changes, so that a refused message leaves no trace.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedward.core.canonical import canonical_json
from fedward.core.errors import AdmissionRefused, SignatureInvalid, UpdateRejected
from fedward.core.identity import Identity, PublicIdentity
from fedward.privacy.secagg import keys, messages, shamir
from fedward.privacy.secagg.masks import Mask, apply_masks
from fedward.privacy.secagg.terms import Terms

_COORDINATOR = "the coordinator"


@dataclass(frozen=True, slots=True)
class _Agreement:
    """What the signed key list fixed.

    Attributes:
        context: Digest of the list.
        holders: Who holds whose shares.
        pairs: For each other holder of this site, the root of the keys shared with it.
    """

    context: bytes
    holders: Mapping[int, tuple[int, ...]]
    pairs: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where this site stands in the newest round; rounds before it are closed for good."""

    number: int
    participants: frozenset[int]
    first: int = 0
    count: int = 0
    masked: bool = False
    confirmed: frozenset[int] | None = None
    unmasked: bool = False


class SiteSession:
    """One site in one run: `key`, `accept`, then for each round `begin`, `mask`, `unmask`.

    A session lives in memory; `freeze` and `thaw` carry it from one process to the next. If it is
    lost the run needs a new agreement.

    Args:
        terms: What the coordinator proposed.
        name: This site's name in the roster.
        identity: This site's Ed25519 identity.
        roster: Every site's pinned identity, from the consortium and not from the coordinator.
        study: Hash of the study that this site admitted.
        min_sites: This site's own limit, `[policy] min_sites`.
        threads: Threads for the masks; by default the processors at hand.

    Raises:
        AdmissionRefused: The terms are not those of the roster, the study or the policy.
    """

    def __init__(
        self,
        terms: Terms,
        *,
        name: str,
        identity: Identity,
        roster: Mapping[str, PublicIdentity],
        study: str,
        min_sites: int,
        threads: int | None = None,
    ) -> None:
        if terms.study != study:
            raise AdmissionRefused(site=name, policy="the study", reason="it is another study")
        if not terms.matches(roster) or terms.sites.get(name) != identity.public.fingerprint:
            raise AdmissionRefused(
                site=name,
                policy="the consortium's roster",
                reason="secure aggregation is proposed with other sites or identities",
            )
        if terms.min_sites < min_sites:
            raise AdmissionRefused(
                site=name,
                policy=f"[policy] min_sites = {min_sites}",
                reason=f"sums of {terms.min_sites} are proposed; raise [aggregation] min_sites",
            )
        self._terms, self._identity, self._roster = terms, identity, dict(roster)
        self._names, self._digest = terms.names, terms.digest
        self._index, self._size = terms.names.index(name), len(terms.names)
        self._threads = threads
        self._private = secrets.token_bytes(keys.SIZE)
        self._root = secrets.token_bytes(keys.SIZE)
        self._agreement: _Agreement | None = None
        self._key_list: bytes | None = None
        self._round: Standing | None = None

    def __repr__(self) -> str:
        """Never a secret."""
        return f"SiteSession({self._names[self._index]!r})"

    @property
    def round_number(self) -> int:
        """The newest round that was begun, 0 before the first."""
        return self._round.number if self._round else 0

    @property
    def standing(self) -> Standing | None:
        """Where this site stands in the newest round."""
        return self._round

    def freeze(self) -> bytes:
        """All that the session must not lose, as bytes that hold SECRET KEYS.

        For a site whose process ends between two messages: write them, for this site's eyes only
        and durably, before the answer leaves, and never `thaw` an older state than the newest: a
        round that was masked twice would give away a difference.
        """
        current = self._round
        value = {
            "private": self._private.hex(),
            "root": self._root.hex(),
            "keys": None if self._key_list is None else self._key_list.hex(),
            "round": None
            if current is None
            else {
                "number": current.number,
                "participants": sorted(current.participants),
                "first": current.first,
                "count": current.count,
                "masked": current.masked,
                "confirmed": None if current.confirmed is None else sorted(current.confirmed),
                "unmasked": current.unmasked,
            },
        }
        return canonical_json(value)

    def thaw(self, frozen: bytes) -> None:
        """Go on where `freeze` was called, in a new session of the same terms.

        Raises:
            UpdateRejected: The keys in it were not agreed under these terms.
        """
        value = json.loads(frozen)
        self._private = bytes.fromhex(value["private"])
        self._root = bytes.fromhex(value["root"])
        if value["keys"] is not None:
            self.accept(bytes.fromhex(value["keys"]))
        if value["round"] is not None:
            current = dict(value["round"])
            current["participants"] = frozenset(current["participants"])
            if current["confirmed"] is not None:
                current["confirmed"] = frozenset(current["confirmed"])
            self._round = Standing(**current)

    def key(self) -> bytes:
        """This site's public key for the run, signed: the answer to the terms."""
        public = keys.public_key(self._private)
        statement = messages.Key.statement(self._digest, self._index, public)
        key = messages.Key(self._index, public, self._identity.sign(statement))
        return key.encode(self._digest)

    def accept(self, key_list: bytes) -> bytes:
        """Agree on keys with the others; answer with the shares of the first rounds.

        The same list may come again (its answer may have been lost); another one is refused.

        Raises:
            UpdateRejected: The list is malformed, too short, lacks this site's own key, holds a
                key that its site did not sign, or differs from the one accepted before.
        """
        context = hashlib.sha256(key_list).digest()
        listed = messages.Keys.decode(
            key_list, terms=self._digest, sites=self._size, sender=_COORDINATOR
        )
        if self._agreement is None:
            self._agreement = self._agree(listed, context)
            self._key_list = key_list
        elif not shamir.same(self._agreement.context, context):
            raise self._reject("another list of keys was accepted in this run")
        return self._shares(1, listed.ahead)

    def shares(self, request: bytes) -> bytes:
        """The shares of the rounds that the coordinator asks for; the same each time.

        Raises:
            UpdateRejected: The request is malformed, or comes before the keys.
        """
        asked = messages.SharesRequest.decode(
            request, context=self._agreed().context, sender=_COORDINATOR
        )
        return self._shares(asked.first, asked.count)

    def begin(self, request: bytes) -> int:
        """Open a round, before training for it, and return its number.

        Raises:
            UpdateRejected: The request is malformed, the round is not newer than all before, or
                the participants are too few, unknown or without this site.
        """
        agreement = self._agreed()
        asked = messages.Round.decode(
            request, context=agreement.context, sites=self._size, sender=_COORDINATOR
        )
        if asked.round_number <= self.round_number:
            raise self._reject(
                f"round {asked.round_number} is not after round {self.round_number}: a replay"
            )
        self._check_members(asked.participants, within=frozenset(agreement.holders))
        if self._index not in asked.participants:
            raise self._reject("opens a round without this site")
        self._round = Standing(asked.round_number, asked.participants, asked.first, asked.count)
        return asked.round_number

    def mask(self, vector: NDArray[np.uint32]) -> memoryview:
        """This round's vector under its masks. Once a round: two would give away a difference.

        Args:
            vector: Shape `(terms.length,)`; unchanged.

        Raises:
            ValueError: The vector's shape or type is wrong.
            UpdateRejected: No round is open, or it was masked, confirmed or unmasked already.
        """
        if vector.dtype != np.uint32 or vector.shape != (self._terms.length,):
            raise ValueError(f"vector must be of uint32 and of shape ({self._terms.length},)")
        return self.mask_filled(lambda out: np.copyto(out, vector))

    def mask_filled(self, fill: Callable[[NDArray[np.uint32]], object]) -> memoryview:
        """As `mask`, of a vector that `fill` writes into the message: no copy of it is made.

        Args:
            fill: Gets an array of shape `(terms.length,)` and writes all of it. If it raises,
                nothing has happened.

        Raises:
            UpdateRejected: As `mask`.
        """
        agreement, current = self._agreed(), self._current()
        if current.masked or current.confirmed is not None or current.unmasked:
            raise self._reject("this round's vector was sent, or is no longer waited for")
        message, masked = messages.Update.start(
            agreement.context,
            round_number=current.number,
            site=self._index,
            signature=self._identity.sign(self._statement(current, current.participants)),
            shares=self._shares(current.first, current.count) if current.count else b"",
            length=self._terms.length,
        )
        fill(masked)
        self._round = replace(current, masked=True)
        seed = self._self_seed(current.number)
        masks = [Mask(seed)] + [
            Mask(self._pair_seed(other, current.number), subtract=self._index > other)
            for other in sorted(agreement.pairs)
            if other in current.participants
        ]
        apply_masks(masked, masks, threads=self._threads)
        return message

    def confirm(self, request: bytes) -> bytes:
        """Sign who survives the round, after some dropped out; one list a round.

        Raises:
            UpdateRejected: Malformed, another round, too few survivors, not this site's own
                vector among them, or another list was confirmed or unmasked before.
        """
        agreement, current = self._agreed(), self._current()
        asked = messages.ConfirmRequest.decode(
            request, context=agreement.context, sites=self._size, sender=_COORDINATOR
        )
        self._check_survivors(current, asked.round_number, asked.survivors)
        if self._index not in asked.survivors:
            raise self._reject("only survivors confirm")
        self._round = replace(current, confirmed=asked.survivors)
        signature = self._identity.sign(self._statement(current, asked.survivors))
        reply = messages.Confirmation(current.number, self._index, signature)
        return reply.encode(agreement.context)

    def unmask(self, request: bytes) -> bytes:
        """Give this site's shares: of a survivor's self-mask, or of a dropout's recovery key.

        Never both of one site, and one answer a round. Against a malicious coordinator the
        request must carry `threshold` survivors' signatures on the list.

        Raises:
            UpdateRejected: As `confirm`, or the signatures do not suffice, or a request was
                answered in this round.
        """
        agreement, current = self._agreed(), self._current()
        asked = messages.UnmaskRequest.decode(
            request, context=agreement.context, sites=self._size, sender=_COORDINATOR
        )
        self._check_survivors(current, asked.round_number, asked.survivors)
        if self._terms.adversary == "malicious":
            self._check_signatures(current, asked)
        self._round = replace(current, unmasked=True)
        found: dict[int, bytes] = {}
        for dealer in sorted(current.participants):
            if self._index not in agreement.holders[dealer] or dealer not in asked.pieces:
                continue
            plain = self._open(asked.pieces[dealer], dealer, current.number)
            if plain is not None:
                survives = dealer in asked.survivors
                found[dealer] = plain[: keys.SIZE] if survives else plain[keys.SIZE :]
        reply = messages.Unmasking(current.number, self._index, found)
        return reply.encode(agreement.context)

    # What follows is private: checks first, then keys.

    def _agree(self, listed: messages.Keys, context: bytes) -> _Agreement:
        members = frozenset(key.site for key in listed.keys)
        self._check_members(members, within=frozenset(range(self._size)))
        own = keys.public_key(self._private)
        for key in listed.keys:
            statement = messages.Key.statement(self._digest, key.site, key.public)
            self._verify(key.site, key.signature, statement)
            if key.site == self._index and not shamir.same(key.public, own):
                raise self._reject("lists a key of this site that is not this run's")
        if self._index not in members:
            raise self._reject("lists no key of this site")
        holders = self._terms.holders(members, context)
        publics = {key.site: key.public for key in listed.keys}
        try:
            pairs = {
                other: keys.agree(self._private, publics[other], context=context)
                for other in holders[self._index]
                if other != self._index
            }
        except ValueError as error:
            raise self._reject("lists a public key of low order") from error
        return _Agreement(context, holders, pairs)

    def _shares(self, first: int, count: int) -> bytes:
        agreement = self._agreed()
        rounds = tuple(self._round_shares(agreement, first + ahead) for ahead in range(count))
        return messages.Shares(self._index, first, rounds).encode(agreement.context)

    def _round_shares(self, agreement: _Agreement, number: int) -> messages.RoundShares:
        """Everything here follows from the session's root: asking twice gives the same bytes."""
        me, holders = self._index, agreement.holders[self._index]
        points = [holder + 1 for holder in holders]
        secret = {"self": self._self_seed(number), "pairs": self._recovery_key(number)}
        split = {
            label: shamir.split(
                secret[label],
                threshold=self._terms.threshold,
                points=points,
                key=keys.derive(self._root, f"{label} polynomial", number),
            )
            for label in secret
        }
        pieces, commitments = [], []
        for at, holder in enumerate(holders):
            plain = split["self"][at] + split["pairs"][at]
            pieces.append(keys.seal(self._piece_key(me, holder, number), plain))
            commitments.append(
                (
                    keys.commitment(split["self"][at], "self", number, me, holder),
                    keys.commitment(split["pairs"][at], "pairs", number, me, holder),
                )
            )
        seeds = b"".join(self._pair_seed(other, number) for other in holders if other != me)
        sealed = keys.seal(secret["pairs"], seeds)
        return messages.RoundShares(sealed, tuple(pieces), tuple(commitments))

    def _self_seed(self, number: int) -> bytes:
        return keys.derive_secret(self._root, "self", number, self._index)

    def _recovery_key(self, number: int) -> bytes:
        return keys.derive_secret(self._root, "recovery", number, self._index)

    def _pair_seed(self, other: int, number: int) -> bytes:
        low, high = sorted((self._index, other))
        return keys.derive(self._agreed().pairs[other], "mask", number, low, high)

    def _piece_key(self, dealer: int, holder: int, number: int) -> bytes:
        """The key that seals a dealer's piece for a holder; this site is one of them."""
        other = holder if dealer == self._index else dealer
        root = self._root if dealer == holder else self._agreed().pairs[other]
        return keys.derive(root, "piece", number, dealer, holder)

    def _open(self, piece: bytes, dealer: int, number: int) -> bytes | None:
        return keys.unseal(self._piece_key(dealer, self._index, number), piece)

    def _statement(self, current: Standing, survivors: frozenset[int]) -> bytes:
        return messages.confirmation(
            self._agreed().context,
            current.number,
            current.participants,
            survivors,
            sites=self._size,
        )

    def _check_members(self, members: frozenset[int], *, within: frozenset[int]) -> None:
        if not members <= within:
            raise self._reject("names a site whose key is not known")
        if len(members) < self._terms.fewest:
            raise self._reject(
                f"a sum of {len(members)} sites; at least {self._terms.fewest} are required"
            )

    def _check_survivors(self, current: Standing, number: int, survivors: frozenset[int]) -> None:
        if number != current.number:
            raise self._reject(f"is for round {number} and not for round {current.number}")
        if current.unmasked:
            raise self._reject(
                "this round's shares were given; a second answer could unmask a site"
            )
        if current.confirmed is not None and survivors != current.confirmed:
            raise self._reject("another list of survivors was confirmed in this round")
        self._check_members(survivors, within=current.participants)
        if self._index in survivors and not current.masked:
            raise self._reject("counts a vector that this site has not sent")
        holders = self._agreed().holders[self._index]
        if len(survivors.intersection(holders)) < self._terms.threshold:
            raise self._reject("fewer of this site's neighbours survive than the threshold")

    def _check_signatures(self, current: Standing, asked: messages.UnmaskRequest) -> None:
        statement = self._statement(current, asked.survivors)
        if not asked.signatures.keys() <= asked.survivors:
            raise self._reject("carries a signature of a site that does not survive")
        if len(asked.signatures) < self._terms.threshold:
            raise self._reject(
                f"{len(asked.signatures)} survivors confirm the list; "
                f"{self._terms.threshold} are required"
            )
        for site, signature in asked.signatures.items():
            self._verify(site, signature, statement)

    def _verify(self, site: int, signature: bytes, statement: bytes) -> None:
        try:
            self._roster[self._names[site]].verify(signature, statement)
        except SignatureInvalid as error:
            raise self._reject(f"site {self._names[site]} did not sign this") from error

    def _agreed(self) -> _Agreement:
        if self._agreement is None:
            raise self._reject("comes before the list of keys")
        return self._agreement

    def _current(self) -> Standing:
        if self._round is None:
            raise self._reject("comes before the first round")
        return self._round

    @staticmethod
    def _reject(reason: str) -> UpdateRejected:
        return UpdateRejected(site=_COORDINATOR, reason=reason)
