"""A walk over everything that a dishonest coordinator can do to the real state machines.

The coordinator, with some sites on its side, may deliver any message of a finite menu to any
honest site, in any order, any number of times, or never: rounds opened for any set of sites, old
rounds again, any list of survivors to be confirmed or unmasked, with all signatures that it has
seen or can make. Every state is visited once. What it learns is read from the bytes that the sites
answer with; a state in which it knows too much is a violation.
"""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedward.core.errors import UpdateRejected
from fedward.core.identity import Identity
from fedward.privacy.secagg import keys, messages
from fedward.privacy.secagg.site import SiteSession
from fedward.privacy.secagg.terms import Terms

Sites = frozenset[int]
_STUDY: Final = "e0" * 32


@dataclass(frozen=True, slots=True)
class Move:
    """One message to one honest site. `survivors` is the list shown, or the participants."""

    kind: str
    site: int
    round_number: int = 0
    shown: Sites = frozenset()
    signers: Sites = frozenset()


@dataclass(frozen=True, slots=True)
class Known:
    """Something that a site's answers gave away.

    Attributes:
        what: "masked" (under the participants `shown`), "twice" (a second vector in a round),
            "signed" (participants `shown`, survivors `survivors`), "self" or "pairs" (a share of
            `dealer`'s secret).
    """

    what: str
    round_number: int
    shown: Sites = frozenset()
    survivors: Sites = frozenset()
    dealer: int = -1


@dataclass(frozen=True, slots=True)
class Walk:
    """What a walk found.

    Attributes:
        states: Distinct states visited.
        messages: Messages delivered, refused ones included.
        violation: What the coordinator learnt, or None.
        trace: The accepted moves that lead there.
    """

    states: int
    messages: int
    violation: str | None
    trace: tuple[Move, ...]


class Explorer:
    """Walks over a protocol of `count` sites of which the last `dishonest` are the coordinator's.

    Args:
        count: Sites.
        dishonest: How many of them tell the coordinator everything and sign anything.
        threshold: In place of the smallest safe one; any number, to plant a mistake.
        rounds: Rounds, from 1 on.
        session: The site's state machine, or one with a mistake planted.
    """

    def __init__(
        self,
        count: int,
        *,
        dishonest: int = 0,
        threshold: int | None = None,
        rounds: int = 1,
        session: Callable[..., SiteSession] = SiteSession,
    ) -> None:
        self.count, self.dishonest, self.rounds = count, dishonest, rounds
        identities = {f"site-{index}": Identity.generate_site() for index in range(count)}
        roster = {name: identity.public for name, identity in identities.items()}
        terms = Terms.propose(study=_STUDY, roster=roster, length=1)
        if threshold is not None:
            object.__setattr__(terms, "threshold", threshold)
        self.terms, self._identities = terms, list(identities.values())
        sites = [
            session(
                terms,
                name=name,
                identity=identity,
                roster=roster,
                study=_STUDY,
                min_sites=3,
                threads=1,
            )
            for name, identity in identities.items()
        ]
        self._agree(sites)
        self.honest = range(count - dishonest)
        self._subsets = [
            frozenset(chosen)
            for size in range(count + 1)
            for chosen in itertools.combinations(range(count), size)
        ]
        # A local state is a machine and what its answers gave away; each gets a number.
        self._machines: list[tuple[SiteSession, frozenset[Known]]] = []
        self._signed_by: list[frozenset[Known]] = []
        self._given: list[frozenset[Known]] = []
        self._numbers: dict[object, int] = {}
        self._effects: dict[object, tuple[int, list[tuple[Move, int]]]] = {}
        self._verdicts: dict[tuple[frozenset[Known], ...], str | None] = {}
        self._steps: dict[tuple[int, Move], int] = {}
        self._start = tuple(self._number(index, sites[index], frozenset()) for index in self.honest)

    def walk(self, *, limit: int = 10_000_000) -> Walk:
        """Visit every state, breadth first, until a violation.

        Raises:
            ValueError: There are more states than `limit`.
        """
        parents: dict[tuple[int, ...], tuple[tuple[int, ...], Move] | None] = {self._start: None}
        waiting = deque([self._start])
        delivered = 0
        while waiting:
            state = waiting.popleft()
            signed = [self._signed_by[number] for number in state]
            for site in self.honest:
                sent, changes = self._changes(site, state[site], tuple(signed))
                delivered += sent
                for move, number in changes:
                    after = (*state[:site], number, *state[site + 1 :])
                    if after in parents:
                        continue
                    parents[after] = state, move
                    if found := self._violation(tuple(self._given[n] for n in after)):
                        return Walk(len(parents), delivered, found, _trace(parents, after))
                    waiting.append(after)
                    if len(parents) > limit:
                        raise ValueError(f"more than {limit} states")
        return Walk(len(parents), delivered, None, ())

    def _agree(self, sites: list[SiteSession]) -> None:
        """An honest key agreement; lies in it have tests of their own."""
        digest = self.terms.digest
        listed = [
            messages.Key.decode(s.key(), terms=digest, sites=self.count, sender="") for s in sites
        ]
        key_list = messages.Keys(tuple(listed), self.rounds).encode(digest)
        bundles = [site.accept(key_list) for site in sites]
        self._context = bundles[0][6:38]
        everyone = tuple(range(self.count))
        self._shares = [
            messages.Shares.decode(
                bundle,
                context=self._context,
                holders=dict.fromkeys(everyone, everyone),
                sender="",
            ).rounds
            for bundle in bundles
        ]

    def _number(self, index: int, machine: SiteSession, known: frozenset[Known]) -> int:
        key = index, machine.standing, known
        if key not in self._numbers:
            self._numbers[key] = len(self._machines)
            self._machines.append((machine, known))
            signed = frozenset(item for item in known if item.what == "signed")
            self._signed_by.append(signed)
            self._given.append(known - signed)
        return self._numbers[key]

    def _changes(
        self, site: int, number: int, signed: tuple[frozenset[Known], ...]
    ) -> tuple[int, list[tuple[Move, int]]]:
        """How many messages a site can get, and those that change it, with what it becomes.

        It depends on the site's own state and on what the others have signed; on nothing else.
        """
        key = site, number, signed
        if key not in self._effects:
            moves = list(self._moves(site, number, signed))
            after = [(move, self._deliver(number, move)) for move in moves]
            self._effects[key] = len(moves), [pair for pair in after if pair[1] != number]
        return self._effects[key]

    def _moves(
        self, site: int, number: int, signed: tuple[frozenset[Known], ...]
    ) -> Iterator[Move]:
        yield Move("mask", site)
        standing = self._machines[number][0].standing
        view = standing.participants if standing else frozenset(range(self.count))
        for round_number in range(1, self.rounds + 1):
            for shown in self._subsets:
                yield Move("begin", site, round_number, shown)
                yield Move("confirm", site, round_number, shown)
                statement = Known("signed", round_number, view, shown)
                signers = {o for o in self.honest if o in shown and statement in signed[o]}
                liars = {o for o in shown if o not in self.honest}
                yield Move("unmask", site, round_number, shown, frozenset(signers | liars))

    def _deliver(self, number: int, move: Move) -> int:
        """The local state after a move; the same one if the machine refuses."""
        if (number, move) not in self._steps:
            machine, known = self._machines[number]
            machine = copy.copy(machine)
            try:
                learnt = self._answer(machine, move, known)
            except UpdateRejected:
                self._steps[number, move] = number
            else:
                self._steps[number, move] = self._number(move.site, machine, known | learnt)
        return self._steps[number, move]

    def _answer(self, site: SiteSession, move: Move, known: frozenset[Known]) -> frozenset[Known]:
        context, count, number = self._context, self.count, move.round_number
        if move.kind == "begin":
            site.begin(messages.Round(number, move.shown).encode(context, sites=count))
            return frozenset()
        if move.kind == "confirm":
            request = messages.ConfirmRequest(number, move.shown)
            data = site.confirm(request.encode(context, sites=count))
            reply = messages.Confirmation.decode(data, context=context, sites=count, sender="")
            return frozenset({self._signed(site, move.site, reply.signature, move.shown)})
        if move.kind == "mask":
            return self._masked(site, move.site, known)
        request_data = self._unmask_request(site, move)
        data = site.unmask(request_data)
        unmasking = messages.Unmasking.decode(data, context=context, sites=count, sender="")
        return frozenset(
            Known(self._which(number, dealer, move.site, share), number, dealer=dealer)
            for dealer, share in unmasking.shares.items()
        )

    def _masked(self, site: SiteSession, index: int, known: frozenset[Known]) -> frozenset[Known]:
        data = site.mask(np.zeros(1, dtype=np.uint32))
        update = messages.Update.decode(
            data, context=self._context, sites=self.count, length=1, longest=0, sender=""
        )
        shown = site.standing.participants if site.standing else frozenset()
        masked = Known("masked", update.round_number, shown)
        if masked in known:
            masked = Known("twice", update.round_number, shown)
        return frozenset({masked, self._signed(site, index, update.signature, shown)})

    def _signed(self, site: SiteSession, index: int, signature: bytes, survivors: Sites) -> Known:
        standing = site.standing
        if standing is None:
            raise ValueError("a site signed without a round")
        statement = messages.confirmation(
            self._context, standing.number, standing.participants, survivors, sites=self.count
        )
        self._identities[index].public.verify(signature, statement)
        return Known("signed", standing.number, standing.participants, survivors)

    def _unmask_request(self, site: SiteSession, move: Move) -> bytes:
        view = site.standing.participants if site.standing else move.shown
        statement = messages.confirmation(
            self._context, move.round_number, view, move.shown, sites=self.count
        )
        # Ed25519 is deterministic: signing again gives the signature that was seen.
        signatures = {s: self._identities[s].sign(statement) for s in move.signers}
        pieces = {
            dealer: self._shares[dealer][move.round_number - 1].pieces[move.site]
            for dealer in range(self.count)
        }
        request = messages.UnmaskRequest(move.round_number, move.shown, signatures, pieces)
        return request.encode(self._context, sites=self.count)

    def _which(self, number: int, dealer: int, holder: int, share: bytes) -> str:
        """Which secret a share is of, by the dealer's digests."""
        announced = self._shares[dealer][number - 1].commitments[holder]
        for label, digest in zip(("self", "pairs"), announced, strict=True):
            if keys.commitment(share, label, number, dealer, holder) == digest:
                return label
        raise ValueError("a site answered with something that is no share")

    def _violation(self, given: tuple[frozenset[Known], ...]) -> str | None:
        """What the coordinator knows too much, or None."""
        if given not in self._verdicts:
            found = (self._judge(number, given) for number in range(1, self.rounds + 1))
            self._verdicts[given] = next(filter(None, found), None)
        return self._verdicts[given]

    def _judge(self, number: int, given: tuple[frozenset[Known], ...]) -> str | None:
        held = {"self": [0] * self.count, "pairs": [0] * self.count}
        views: dict[int, Sites] = {}
        for site, items in zip(self.honest, given, strict=True):
            for item in items:
                if item.round_number != number:
                    continue
                if item.what in held:
                    held[item.what][item.dealer] += 1
                elif item.what == "masked":
                    views[site] = item.shown
                elif item.what == "twice":
                    return f"two vectors of site {site} under one mask in round {number}"
        enough = self.terms.threshold - self.dishonest
        bare = {site for site in self.honest if held["self"][site] >= enough}
        opened = {site for site in self.honest if held["pairs"][site] >= enough}
        if both := bare & opened:
            return f"both secrets of site {min(both)} in round {number}"
        if exposed := self._exposed(views, bare, opened):
            return f"the sum of honest sites {sorted(exposed)} alone in round {number}"
        return None

    def _exposed(self, views: dict[int, Sites], bare: set[int], opened: set[int]) -> Sites | None:
        """Honest sites, with the dishonest fewer than allowed, whose sum bears no mask."""

        def unknown(member: int) -> set[int]:
            """With whom a member's vector shares a stream that the coordinator does not know."""
            honest = (other for other in views[member] if other in self.honest)
            return {o for o in honest if o != member and not {member, o} & opened}

        for site in views:
            # Such a stream must cancel against the other's vector, which brings its own.
            group, new = {site}, {site}
            while new <= views.keys() and new:
                new = set().union(*(unknown(member) for member in new)) - group
                group |= new
            cancels = not new and all(
                member in views[other] for member in group for other in unknown(member)
            )
            if cancels and group <= bare and len(group) + self.dishonest < self.terms.fewest:
                return frozenset(group)
        return None


def _trace(
    parents: dict[tuple[int, ...], tuple[tuple[int, ...], Move] | None], state: tuple[int, ...]
) -> tuple[Move, ...]:
    moves: list[Move] = []
    while (step := parents[state]) is not None:
        state, move = step
        moves.append(move)
    return tuple(reversed(moves))
