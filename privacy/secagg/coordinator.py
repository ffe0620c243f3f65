"""The coordinator's side of secure aggregation: messages in, messages out.

It adds each masked vector to one running sum as it comes, and learns that sum and nothing else.
A message that cannot be used raises `UpdateRejected` and changes nothing; the caller goes on with
the other sites.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedward.core.errors import AggregationAborted, SignatureInvalid, UpdateRejected
from fedward.core.identity import PublicIdentity
from fedward.privacy.secagg import keys, messages, shamir
from fedward.privacy.secagg.masks import Mask, apply_masks
from fedward.privacy.secagg.terms import Terms

_Step = Literal["updates", "confirmations", "unmaskings"]


@dataclass(frozen=True, slots=True)
class RoundSum:
    """What a round gives.

    Attributes:
        round_number: The round.
        survivors: The sites in the sum, in order.
        total: The sum of their vectors mod 2^32, shape `(length,)`.
        disputes: Pairs of a holder and a dealer whose share was not what the dealer had announced:
            whoever stands in many of them made them up.
    """

    round_number: int
    survivors: tuple[str, ...]
    total: NDArray[np.uint32]
    disputes: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Round:
    number: int
    participants: frozenset[int]
    total: NDArray[np.uint32]
    step: _Step = "updates"
    signatures: dict[int, bytes] = field(default_factory=dict)
    survivors: frozenset[int] = frozenset()
    confirmations: dict[int, bytes] = field(default_factory=dict)
    unmaskings: dict[int, Mapping[int, bytes]] = field(default_factory=dict)
    disputes: list[tuple[int, int]] = field(default_factory=list)


class CoordinatorSession:
    """The coordinator of one run.

    Args:
        terms: What was proposed to the sites.
        roster: Every site's pinned identity.
        ahead: For how many rounds sites hand out shares in advance: a site that misses fewer
            rounds comes back without an extra exchange.
        threads: Threads for the masks; by default the processors at hand.

    Raises:
        ValueError: The terms are not those of the roster, or `ahead` is out of range.
    """

    def __init__(
        self,
        terms: Terms,
        *,
        roster: Mapping[str, PublicIdentity],
        ahead: int = 4,
        threads: int | None = None,
    ) -> None:
        if not terms.matches(roster):
            raise ValueError("the terms name other sites or identities than the roster")
        if not 1 <= ahead <= messages.MAX_AHEAD:
            raise ValueError(f"ahead must be 1 to {messages.MAX_AHEAD}")
        self._terms, self._roster, self._ahead, self._threads = terms, dict(roster), ahead, threads
        self._names, self._digest = terms.names, terms.digest
        self._size = len(self._names)
        self._place = {name: index for index, name in enumerate(self._names)}
        self._keys: dict[int, messages.Key] = {}
        self._context: bytes | None = None
        self._list = b""
        self._holders: Mapping[int, tuple[int, ...]] = {}
        self._shares: dict[tuple[int, int], messages.RoundShares] = {}
        self._round: _Round | None = None
        self._last = 0

    # Key agreement, once a run.

    def add_key(self, site: str, data: bytes) -> None:
        """Take a site's signed key. Raises `UpdateRejected`."""
        if self._context is not None:
            raise self._reject(site, "its key came after the list was closed")
        index = self._index(site)
        key = messages.Key.decode(data, terms=self._digest, sites=self._size, sender=site)
        self._check(site, key.site == index, "speaks for another site")
        self._check(site, index not in self._keys, "sent a key already")
        statement = messages.Key.statement(self._digest, index, key.public)
        self._verify(site, key.signature, statement)
        self._check(site, keys.usable(key.public), "its key is of low order")
        self._keys[index] = key

    def key_list(self) -> dict[str, bytes]:
        """Close the list of keys; the message for each site on it.

        Raises:
            AggregationAborted: Too few sites sent a key.
        """
        if self._context is None:
            if len(self._keys) < self._terms.fewest:
                raise self._aborted(0, frozenset(range(self._size)).difference(self._keys))
            ordered = tuple(self._keys[index] for index in sorted(self._keys))
            self._list = messages.Keys(ordered, self._ahead).encode(self._digest)
            self._context = hashlib.sha256(self._list).digest()
            self._holders = self._terms.holders(frozenset(self._keys), self._context)
        return {self._names[index]: self._list for index in sorted(self._keys)}

    def add_shares(self, site: str, data: bytes) -> None:
        """Take a site's shares of later rounds. Raises `UpdateRejected`."""
        index = self._index(site)
        shares = self._read_shares(site, index, data)
        self._keep(shares)

    def shares_request(self, round_number: int) -> dict[str, bytes]:
        """For each site without shares of a round, a request for them; none in the good case."""
        context = self._agreed()
        request = messages.SharesRequest(round_number, self._ahead).encode(context)
        lacking = (i for i in sorted(self._holders) if (i, round_number) not in self._shares)
        return {self._names[index]: request for index in lacking}

    # A round: updates, confirmations if a site dropped out, unmaskings.

    def open_round(
        self, round_number: int, *, cohort: Iterable[str] | None = None
    ) -> dict[str, bytes]:
        """Open a round for the sites of `cohort` whose shares are at hand.

        A void round's number is never used again; go on with the next.

        Args:
            round_number: Larger than every round's before.
            cohort: Who is asked; by default all that agreed on keys.

        Returns:
            The request for each participant.

        Raises:
            ValueError: The round's number is not new, or a name is unknown.
            AggregationAborted: Too few sites can take part.
        """
        context = self._agreed()
        if round_number <= self._last:
            raise ValueError(f"round {round_number} is not after round {self._last}")
        asked = range(self._size) if cohort is None else [self._place[name] for name in cohort]
        ready = frozenset(index for index in asked if (index, round_number) in self._shares)
        self._last, self._round = round_number, None
        self._shares = {key: kept for key, kept in self._shares.items() if key[1] >= round_number}
        if len(ready) < self._terms.fewest:
            raise self._aborted(round_number, frozenset(asked) - ready)
        total = np.empty(self._terms.length, dtype=np.uint32)
        self._round = _Round(round_number, ready, total)
        return {self._names[i]: self._round_request(i, context) for i in sorted(ready)}

    def add_update(self, site: str, data: bytes | bytearray | memoryview) -> None:
        """Add a site's masked vector to the sum. Raises `UpdateRejected`."""
        current, index = self._expect(site, "updates")
        self._check(site, index in current.participants, "does not take part in this round")
        self._check(site, index not in current.signatures, "sent its vector already")
        longest = messages.Shares.size(len(self._holders[index]), messages.MAX_AHEAD)
        update = messages.Update.decode(
            data,
            context=self._agreed(),
            sites=self._size,
            length=self._terms.length,
            longest=longest,
            sender=site,
        )
        self._check(site, update.site == index, "speaks for another site")
        self._check(site, update.round_number == current.number, "answers another round")
        self._verify(site, update.signature, self._statement(current, current.participants))
        shares = self._read_shares(site, index, update.shares) if update.shares else None
        if current.signatures:
            np.add(current.total, update.vector, out=current.total)
        else:
            np.copyto(current.total, update.vector)
        current.signatures[index] = update.signature
        if shares is not None:
            self._keep(shares)

    def close_updates(self) -> dict[str, bytes]:
        """Fix the survivors; the requests to confirm them, or none if none are needed.

        If everybody survives, the signatures that came with the vectors confirm it.

        Raises:
            AggregationAborted: Too few vectors came. Nothing was learnt.
        """
        current = self._step("updates")
        current.survivors = frozenset(current.signatures)
        if len(current.survivors) < self._terms.fewest:
            raise self._void(current.survivors)
        if self._terms.adversary == "honest-but-curious":
            current.step = "unmaskings"
            return {}
        if current.survivors == current.participants:
            current.confirmations = current.signatures
            current.step = "unmaskings"
            return {}
        current.step = "confirmations"
        request = messages.ConfirmRequest(current.number, current.survivors)
        data = request.encode(self._agreed(), sites=self._size)
        return {self._names[index]: data for index in sorted(current.survivors)}

    def add_confirmation(self, site: str, data: bytes) -> None:
        """Take a survivor's signature. Raises `UpdateRejected`."""
        current, index = self._expect(site, "confirmations")
        reply = messages.Confirmation.decode(
            data, context=self._agreed(), sites=self._size, sender=site
        )
        self._check(site, reply.site == index, "speaks for another site")
        self._check(site, reply.round_number == current.number, "answers another round")
        self._check(site, index in current.survivors, "is no survivor")
        self._verify(site, reply.signature, self._statement(current, current.survivors))
        current.confirmations[index] = reply.signature

    def unmask_requests(self) -> dict[str, bytes]:
        """The request for each participant; one that was too late may help to unmask the others.

        Raises:
            AggregationAborted: Fewer than `threshold` survivors confirmed. Nothing was learnt.
        """
        current = self._round
        if current is None or current.step == "updates":
            raise ValueError("close the updates first")
        if current.step == "confirmations":
            if len(current.confirmations) < self._terms.threshold:
                raise self._void(frozenset(current.confirmations))
            current.step = "unmaskings"
        signatures = dict(sorted(current.confirmations.items())[: self._terms.threshold])
        requests = {}
        for index in sorted(current.participants):
            pieces = {}
            for dealer in sorted(current.participants):
                if index in self._holders[dealer]:
                    place = self._holders[dealer].index(index)
                    pieces[dealer] = self._shares[dealer, current.number].pieces[place]
            request = messages.UnmaskRequest(current.number, current.survivors, signatures, pieces)
            requests[self._names[index]] = request.encode(self._agreed(), sites=self._size)
        return requests

    def add_unmasking(self, site: str, data: bytes) -> None:
        """Take a site's shares. Raises `UpdateRejected`.

        A share that differs from what its dealer announced is left out and noted: the holder
        changed it, or the dealer announced another, and either way it could only spoil the sum.
        """
        current, index = self._expect(site, "unmaskings")
        self._check(site, index in current.participants, "does not take part in this round")
        self._check(site, index not in current.unmaskings, "sent its shares already")
        reply = messages.Unmasking.decode(
            data, context=self._agreed(), sites=self._size, sender=site
        )
        self._check(site, reply.site == index, "speaks for another site")
        self._check(site, reply.round_number == current.number, "answers another round")
        good: dict[int, bytes] = {}
        for dealer, share in reply.shares.items():
            known = dealer in current.participants and index in self._holders[dealer]
            self._check(site, known, "sends a share that it does not hold")
            if self._announced(current, dealer, index, share):
                good[dealer] = share
        current.disputes.extend((index, dealer) for dealer in reply.shares if dealer not in good)
        current.unmaskings[index] = good

    @property
    def complete(self) -> bool:
        """Whether enough shares came to end the round; waiting for more is pointless then."""
        current = self._round
        return (
            current is not None
            and current.step == "unmaskings"
            and all(
                len(self._held(current, dealer)) >= self._terms.threshold
                for dealer in self._needed(current)
            )
        )

    def finish(self) -> RoundSum:
        """Take the masks off the sum and end the round.

        Raises:
            AggregationAborted: A site's secret cannot be rebuilt. Nothing was learnt of the sum.
        """
        current = self._step("unmaskings")
        if not self.complete:
            raise self._void(frozenset(current.unmaskings))
        masks: list[Mask] = []
        lagrange: dict[tuple[int, ...], list[int]] = {}
        for dealer in self._needed(current):
            holders = self._held(current, dealer)[: self._terms.threshold]
            if holders not in lagrange:
                lagrange[holders] = shamir.weights([holder + 1 for holder in holders])
            shares = [current.unmaskings[holder][dealer] for holder in holders]
            secret = shamir.combine(shares, lagrange[holders])
            if dealer in current.survivors:
                masks.append(Mask(secret, subtract=True))
            else:
                masks.extend(self._pair_masks(current, dealer, secret))
        self._round = None
        apply_masks(current.total, masks, threads=self._threads)
        return RoundSum(
            current.number,
            tuple(self._names[index] for index in sorted(current.survivors)),
            current.total,
            tuple(
                (self._names[holder], self._names[dealer]) for holder, dealer in current.disputes
            ),
        )

    # What follows is private.

    def _announced(self, current: _Round, dealer: int, holder: int, share: bytes) -> bool:
        """Whether a share is the one of which its dealer sent the digest."""
        label, which = ("self", 0) if dealer in current.survivors else ("pairs", 1)
        place = self._holders[dealer].index(holder)
        announced = self._shares[dealer, current.number].commitments[place][which]
        return shamir.same(announced, keys.commitment(share, label, current.number, dealer, holder))

    def _pair_masks(self, current: _Round, dealer: int, secret: bytes) -> list[Mask]:
        """What the survivors' masks with a dropped-out site left in the sum, to be taken off."""
        opened = keys.unseal(secret, self._shares[dealer, current.number].seeds)
        if opened is None:
            # Its dealer sealed nonsense: the round is lost, and the log says through whom.
            raise self._void(current.participants - {dealer})
        others = [holder for holder in self._holders[dealer] if holder != dealer]
        seeds = {
            other: opened[at * keys.SIZE : (at + 1) * keys.SIZE] for at, other in enumerate(others)
        }
        # A survivor of lower index added the stream, one of higher index subtracted it.
        return [
            Mask(seed, subtract=other < dealer)
            for other, seed in seeds.items()
            if other in current.survivors
        ]

    def _needed(self, current: _Round) -> list[int]:
        """Whose secrets are needed: survivors, and dropouts with a neighbour that survives."""
        return [
            index
            for index in sorted(current.participants)
            if index in current.survivors or current.survivors.intersection(self._holders[index])
        ]

    def _held(self, current: _Round, dealer: int) -> tuple[int, ...]:
        return tuple(h for h in sorted(current.unmaskings) if dealer in current.unmaskings[h])

    def _round_request(self, index: int, context: bytes) -> bytes:
        current = self._round
        if current is None:
            raise ValueError("open a round first")
        later = range(current.number + 1, current.number + 1 + self._ahead)
        missing = [number for number in later if (index, number) not in self._shares]
        first, count = (missing[0], later.stop - missing[0]) if missing else (0, 0)
        request = messages.Round(current.number, current.participants, first, count)
        return request.encode(context, sites=self._size)

    def _read_shares(self, site: str, index: int, data: bytes) -> messages.Shares:
        shares = messages.Shares.decode(
            data, context=self._agreed(), holders=self._holders, sender=site
        )
        self._check(site, shares.site == index, "speaks for another site")
        in_reach = self._last + messages.MAX_AHEAD
        last = shares.first + len(shares.rounds) - 1
        self._check(site, last <= in_reach, "sends shares of rounds far ahead")
        return shares

    def _keep(self, shares: messages.Shares) -> None:
        for number, kept in enumerate(shares.rounds, start=shares.first):
            if number > self._last:
                self._shares[shares.site, number] = kept

    def _statement(self, current: _Round, survivors: frozenset[int]) -> bytes:
        return messages.confirmation(
            self._agreed(), current.number, current.participants, survivors, sites=self._size
        )

    def _verify(self, site: str, signature: bytes, statement: bytes) -> None:
        try:
            self._roster[site].verify(signature, statement)
        except SignatureInvalid as error:
            raise self._reject(site, "its signature does not verify") from error

    def _agreed(self) -> bytes:
        if self._context is None:
            raise ValueError("close the list of keys first")
        return self._context

    def _step(self, step: _Step) -> _Round:
        if self._round is None or self._round.step != step:
            raise ValueError(f"this is not the time for {step}")
        return self._round

    def _expect(self, site: str, step: _Step) -> tuple[_Round, int]:
        index = self._index(site)
        if self._round is None or self._round.step != step:
            raise self._reject(site, "answers what was not asked")
        return self._round, index

    def _index(self, site: str) -> int:
        if site not in self._place:
            raise self._reject(site, "is not on the roster")
        return self._place[site]

    def _check(self, site: str, holds: bool, reason: str) -> None:
        if not holds:
            raise self._reject(site, reason)

    def _void(self, answered: frozenset[int]) -> AggregationAborted:
        """Forget the round's masked sum and say who is missing."""
        current = self._round
        if current is None:
            raise ValueError("no round is open")
        self._round = None
        return self._aborted(current.number, current.participants - answered)

    def _aborted(self, round_number: int, missing: Iterable[int]) -> AggregationAborted:
        return AggregationAborted(
            round_number=round_number,
            missing=[self._names[index] for index in sorted(missing)],
            threshold=self._terms.fewest,
        )

    @staticmethod
    def _reject(site: str, reason: str) -> UpdateRejected:
        return UpdateRejected(site=site, reason=reason)
