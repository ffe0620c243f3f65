"""A lying coordinator and lying sites: each cell of the threat model."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from fedward.core.errors import AdmissionRefused, AggregationAborted, UpdateRejected
from fedward.core.identity import Identity
from fedward.privacy.secagg import CoordinatorSession, SiteSession, Terms, keys, messages
from fedward.privacy.secagg.masks import Mask, apply_masks
from fedward.privacy.secagg.rounds import agree, make_sessions, run_round

COUNT, LENGTH = 4, 50_000
EVERYONE = frozenset(range(COUNT))


class Liar:
    """A coordinator that knows the protocol, says what it wants and keeps all that it hears."""

    def __init__(self, count: int = COUNT, *, length: int = 8) -> None:
        self.coordinator, self.sites = make_sessions(count, length=length)
        self.names = sorted(self.sites)
        self.count, self.length = count, length
        self.terms = next(iter(self.sites.values()))._terms
        self.keys = [
            messages.Key.decode(s.key(), terms=self.terms.digest, sites=count, sender="")
            for s in self.sites.values()
        ]
        self.signatures: dict[int, bytes] = {}

    def site(self, index: int) -> SiteSession:
        return self.sites[self.names[index]]

    def list_of(self, listed: list[messages.Key], ahead: int = 3) -> bytes:
        return messages.Keys(tuple(listed), ahead).encode(self.terms.digest)

    def agree(self) -> None:
        key_list = self.list_of(self.keys)
        self.context = hashlib.sha256(key_list).digest()
        everyone = tuple(range(self.count))
        self.shares = [
            messages.Shares.decode(
                self.site(index).accept(key_list),
                context=self.context,
                holders=dict.fromkeys(everyone, everyone),
                sender="",
            ).rounds
            for index in range(self.count)
        ]

    def begin(self, index: int, participants: frozenset[int] = EVERYONE, *, number: int = 1) -> int:
        request = messages.Round(number, participants).encode(self.context, sites=self.count)
        return self.site(index).begin(request)

    def mask(self, index: int, vector: np.ndarray | None = None) -> np.ndarray:
        chosen = np.zeros(self.length, np.uint32) if vector is None else vector
        update = messages.Update.decode(
            self.site(index).mask(chosen),
            context=self.context,
            sites=self.count,
            length=self.length,
            longest=0,
            sender="",
        )
        self.signatures[index] = update.signature
        return update.vector

    def confirm(self, index: int, survivors: frozenset[int], *, number: int = 1) -> bytes:
        request = messages.ConfirmRequest(number, survivors)
        reply = self.site(index).confirm(request.encode(self.context, sites=self.count))
        return messages.Confirmation.decode(
            reply, context=self.context, sites=self.count, sender=""
        ).signature

    def unmask(
        self,
        index: int,
        survivors: frozenset[int],
        signatures: dict[int, bytes],
        *,
        number: int = 1,
        pieces_of: int = 1,
    ) -> dict[int, bytes]:
        pieces = {d: self.shares[d][pieces_of - 1].pieces[index] for d in range(self.count)}
        request = messages.UnmaskRequest(number, survivors, signatures, pieces)
        reply = self.site(index).unmask(request.encode(self.context, sites=self.count))
        return dict(
            messages.Unmasking.decode(
                reply, context=self.context, sites=self.count, sender=""
            ).shares
        )

    def all_masked(self) -> None:
        self.agree()
        for index in range(self.count):
            self.begin(index)
            self.mask(index)


# Malicious coordinator: keys.


def test_a_swapped_key_is_refused() -> None:
    liar = Liar()
    own = keys.public_key(b"\x01" * 32)
    swapped = messages.Key(1, own, liar.keys[1].signature)

    with pytest.raises(UpdateRejected, match="did not sign"):
        liar.site(0).accept(liar.list_of([liar.keys[0], swapped, *liar.keys[2:]]))


def test_a_key_signed_by_an_identity_off_the_roster_is_refused() -> None:
    liar = Liar()
    own = keys.public_key(b"\x01" * 32)
    statement = messages.Key.statement(liar.terms.digest, 1, own)
    forged = messages.Key(1, own, Identity.generate_site().sign(statement))

    with pytest.raises(UpdateRejected, match="did not sign"):
        liar.site(0).accept(liar.list_of([liar.keys[0], forged, *liar.keys[2:]]))


def test_a_key_of_another_run_is_refused() -> None:
    liar, earlier = Liar(), Liar()

    with pytest.raises(UpdateRejected, match="did not sign"):
        liar.site(0).accept(liar.list_of([liar.keys[0], earlier.keys[1], *liar.keys[2:]]))


def test_a_list_without_the_site_or_with_too_few_is_refused() -> None:
    liar = Liar()

    with pytest.raises(UpdateRejected, match="no key of this site"):
        liar.site(0).accept(liar.list_of(liar.keys[1:]))
    with pytest.raises(UpdateRejected, match="sum of 2 sites"):
        liar.site(0).accept(liar.list_of(liar.keys[:2]))


def test_a_second_list_is_refused_and_the_first_may_come_again() -> None:
    liar = Liar()
    first = liar.list_of(liar.keys)
    answer = liar.site(0).accept(first)

    with pytest.raises(UpdateRejected, match="another list"):
        liar.site(0).accept(liar.list_of(liar.keys[:3]))
    assert liar.site(0).accept(first) == answer


def test_sites_that_were_shown_different_lists_share_no_mask() -> None:
    private = [b"\x01" * 32, b"\x02" * 32]
    one = keys.agree(private[0], keys.public_key(private[1]), context=b"a" * 32)
    two = keys.agree(private[1], keys.public_key(private[0]), context=b"b" * 32)

    assert one != two


# Malicious coordinator: terms.


def test_terms_of_another_study_roster_or_policy_are_refused() -> None:
    identities = {name: Identity.generate_site() for name in ("a", "b", "c")}
    roster = {name: identity.public for name, identity in identities.items()}
    stranger = {**roster, "c": Identity.generate_site().public}

    def session(terms: Terms, *, study: str = "aa", min_sites: int = 3) -> SiteSession:
        return SiteSession(
            terms,
            name="a",
            identity=identities["a"],
            roster=roster,
            study=study,
            min_sites=min_sites,
        )

    good = Terms.propose(study="aa", roster=roster, length=1)
    session(good)
    with pytest.raises(AdmissionRefused, match="another study"):
        session(good, study="bb")
    with pytest.raises(AdmissionRefused, match="roster"):
        session(Terms.propose(study="aa", roster=stranger, length=1))
    with pytest.raises(AdmissionRefused, match="min_sites = 4"):
        session(good, min_sites=4)


@pytest.mark.parametrize("threshold", [2, 5, 6, 11])
def test_an_unsafe_threshold_cannot_be_proposed(threshold: int) -> None:
    roster = {str(number): Identity.generate_site().public for number in range(10)}

    with pytest.raises(ValueError, match="threshold must be 7 to 10"):
        Terms.propose(study="aa", roster=roster, length=1, threshold=threshold)


@pytest.mark.parametrize(
    "change",
    [
        {"length": 3.0},
        {"length": True},
        {"length": 0},
        {"sites": ["a", "b", "c"]},
        {"sites": {"a": 1, "b": 2, "c": 3}},
        {"threshold": "3"},
        {"adversary": "nobody"},
        {"more": 1},
        {"run": "../x"},
        {"neighbors": 1},
    ],
)
def test_malformed_terms_are_refused(change: dict[str, object]) -> None:
    roster = {name: Identity.generate_site().public for name in ("a", "b", "c")}
    good = Terms.propose(study="aa", roster=roster, length=1).to_json()
    assert Terms.from_json(good).to_json() == good

    with pytest.raises(ValueError, match=r"."):
        Terms.from_json({**good, **change})
    with pytest.raises(ValueError, match="exactly the keys"):
        Terms.from_json(None)


# Malicious coordinator: a round.


def test_split_lists_of_survivors_get_no_answer() -> None:
    liar = Liar()
    liar.all_masked()
    one, two = frozenset({0, 1, 2}), frozenset({0, 1, 3})
    first = {index: liar.confirm(index, one) for index in (0, 2)}
    second = {index: liar.confirm(index, two) for index in (1, 3)}

    for index, survivors, signatures in ((0, one, first), (1, two, second)):
        with pytest.raises(UpdateRejected, match="3 are required"):
            liar.unmask(index, survivors, signatures)


def test_signatures_of_another_list_round_or_site_do_not_help() -> None:
    liar = Liar()
    liar.all_masked()
    survivors = frozenset({0, 1, 2})
    good = {index: liar.confirm(index, survivors) for index in (0, 1)}

    for forged in (
        {**good, 2: liar.signatures[2]},  # of the list of all
        {**good, 2: good[0]},  # of another site
        {**good, 2: bytes(64)},
    ):
        with pytest.raises(UpdateRejected, match="did not sign"):
            liar.unmask(0, survivors, forged)
    with pytest.raises(UpdateRejected, match="does not survive"):
        liar.unmask(0, survivors, {**good, 3: liar.signatures[3]})


def test_a_site_gives_one_share_of_each_and_answers_once() -> None:
    liar = Liar()
    liar.all_masked()
    without = frozenset({0, 1, 2})

    shares = liar.unmask(0, EVERYONE, liar.signatures)

    labels = {
        dealer: [
            keys.commitment(share, label, 1, dealer, 0) == digest
            for label, digest in zip(
                ("self", "pairs"), liar.shares[dealer][0].commitments[0], strict=True
            )
        ]
        for dealer, share in shares.items()
    }
    assert labels == {dealer: [True, False] for dealer in range(COUNT)}
    for survivors in (EVERYONE, without):
        with pytest.raises(UpdateRejected, match="second answer"):
            liar.unmask(0, survivors, liar.signatures)
    with pytest.raises(UpdateRejected, match="second answer"):
        liar.confirm(0, without)


def test_a_site_that_confirmed_one_list_confirms_and_unmasks_no_other() -> None:
    liar = Liar()
    liar.all_masked()
    liar.confirm(0, frozenset({0, 1, 2}))

    with pytest.raises(UpdateRejected, match="another list"):
        liar.confirm(0, frozenset({0, 1, 3}))
    with pytest.raises(UpdateRejected, match="another list"):
        liar.unmask(0, EVERYONE, liar.signatures)


def test_a_sum_of_too_few_is_refused() -> None:
    liar = Liar()
    liar.agree()

    with pytest.raises(UpdateRejected, match="sum of 2 sites"):
        liar.begin(0, frozenset({0, 1}))
    with pytest.raises(UpdateRejected, match="without this site"):
        liar.begin(0, frozenset({1, 2, 3}))
    liar.begin(0)
    liar.mask(0)
    for ask in (lambda: liar.confirm(0, frozenset({0, 1})),
                lambda: liar.unmask(0, frozenset({0, 1}), {})):  # fmt: skip
        with pytest.raises(UpdateRejected, match="sum of 2 sites"):
            ask()


def test_an_older_round_is_refused() -> None:
    liar = Liar()
    liar.agree()
    liar.begin(0, number=2)
    liar.mask(0)

    for number in (1, 2):
        with pytest.raises(UpdateRejected, match="replay"):
            liar.begin(0, number=number)
    with pytest.raises(UpdateRejected, match="round 1 and not for round 2"):
        liar.unmask(0, EVERYONE, liar.signatures, number=1)
    with pytest.raises(UpdateRejected, match="round 1 and not for round 2"):
        liar.confirm(0, EVERYONE, number=1)


def test_a_round_is_masked_once() -> None:
    liar = Liar()
    liar.agree()
    liar.begin(0)
    liar.mask(0)

    with pytest.raises(UpdateRejected, match="was sent"):
        liar.mask(0)


def test_a_vector_that_was_not_sent_does_not_count() -> None:
    liar = Liar()
    liar.agree()
    liar.begin(0)

    with pytest.raises(UpdateRejected, match="has not sent"):
        liar.confirm(0, EVERYONE)


def test_shares_of_another_round_are_not_opened() -> None:
    liar = Liar()
    liar.all_masked()

    assert liar.unmask(0, EVERYONE, liar.signatures, pieces_of=2) == {}


def test_a_site_shown_other_participants_signs_for_nobody_else() -> None:
    liar = Liar()
    liar.agree()
    liar.begin(0, frozenset({0, 1, 3}))
    for index in (1, 2, 3):
        liar.begin(index)
    for index in range(COUNT):
        liar.mask(index)

    with pytest.raises(UpdateRejected, match="did not sign"):
        liar.unmask(1, EVERYONE, liar.signatures)


def test_each_message_comes_in_its_time() -> None:
    _, sites = make_sessions(3, length=2)
    site = next(iter(sites.values()))

    for ask in (site.shares, site.begin, site.confirm, site.unmask):
        with pytest.raises(UpdateRejected, match="before the list of keys"):
            ask(b"")
    with pytest.raises(UpdateRejected, match="before the list of keys"):
        site.mask(np.zeros(2, np.uint32))


# Honest-but-curious coordinator, with up to t - 1 sites.


def test_what_the_coordinator_and_all_but_two_sites_know_leaves_only_the_sum_of_two() -> None:
    liar = Liar(length=LENGTH)
    liar.agree()
    secret = [np.full(LENGTH, 7, np.uint32), np.full(LENGTH, 9, np.uint32)]
    for index in range(COUNT):
        liar.begin(index)
    masked = [liar.mask(index, secret[index]) for index in (0, 1)]

    # The honest are 0 and 1: strip all masks that 2 and 3 and the unmasking give away.
    known = []
    for index in (0, 1):
        site = liar.site(index)
        seeds = [keys.derive_secret(site._root, "self", 1, index)]
        seeds += [liar.site(other)._pair_seed(index, 1) for other in (2, 3)]
        stripped = masked[index].copy()
        # Of a pair, the site of lower index adds the stream: 0 and 1 did.
        apply_masks(stripped, [Mask(seed, subtract=True) for seed in seeds])
        known.append(stripped)

    assert np.array_equal(known[0] + known[1], secret[0] + secret[1])
    for vector in known:
        assert looks_uniform(vector)


def looks_uniform(vector: np.ndarray) -> bool:
    """Chi-square of each of the four bytes; false alarms below 1e-9 in all."""
    # Laurent and Massart 2000: P[X >= k + 2 sqrt(k x) + 2 x] <= exp(-x), here x = log(4e9).
    limit = 255 + 2 * np.sqrt(255 * 22.2) + 2 * 22.2
    digits = np.ascontiguousarray(vector, dtype="<u4").view(np.uint8).reshape(-1, 4)
    expected = len(digits) / 256
    counts = [np.bincount(digits[:, place], minlength=256) for place in range(4)]
    return all(float(((c - expected) ** 2 / expected).sum()) < limit for c in counts)


def test_two_masked_updates_of_one_vector_look_uniform_and_so_does_their_difference() -> None:
    liar = Liar(length=200_000)
    liar.agree()
    vector = np.full(200_000, 12345, np.uint32)

    masked = []
    for number in (1, 2):
        liar.begin(0, number=number)
        masked.append(liar.mask(0, vector))

    for seen in (*masked, masked[0] - masked[1]):
        assert looks_uniform(seen)
    assert not looks_uniform(vector)


# Malicious sites.


def lying_round(
    lie: Callable[[CoordinatorSession, dict[str, SiteSession], str], None],
) -> tuple[CoordinatorSession, dict[str, SiteSession], dict[str, np.ndarray]]:
    coordinator, sites = make_sessions(7, length=8)
    agree(coordinator, sites)
    vectors = {name: np.full(8, 10**place, np.uint32) for place, name in enumerate(sorted(sites))}
    lie(coordinator, sites, min(sites))
    return coordinator, sites, vectors


def test_garbage_and_a_missing_mask_spoil_the_sum_but_show_no_other_site() -> None:
    class Careless(SiteSession):
        def mask(self, vector: np.ndarray) -> memoryview:
            message = super().mask(vector)
            message[-4 * len(vector) :] = vector.tobytes()
            return message

    def lie(_: CoordinatorSession, sites: dict[str, SiteSession], name: str) -> None:
        sites[name].__class__ = Careless

    coordinator, sites, vectors = lying_round(lie)

    result = run_round(coordinator, sites, vectors, round_number=1)

    plain: np.ndarray = np.stack(list(vectors.values())).sum(axis=0, dtype=np.uint32)
    assert not np.any(result.total == plain)


def test_a_changed_share_is_left_out_named_and_the_sum_stays_exact() -> None:
    class Changes(SiteSession):
        def unmask(self, request: bytes) -> bytes:
            return super().unmask(request)[:-1] + b"\x5a"

    def lie(_: CoordinatorSession, sites: dict[str, SiteSession], name: str) -> None:
        sites[name].__class__ = Changes

    coordinator, sites, vectors = lying_round(lie)

    result = run_round(coordinator, sites, vectors, round_number=1)

    assert result.total[0] == 1111111
    assert result.disputes == (("site-0000", "site-0006"),)


def test_lost_shares_are_survived_up_to_the_threshold() -> None:
    def lie(coordinator: CoordinatorSession, _: dict[str, SiteSession], name: str) -> None:
        index = coordinator._names.index(name)
        kept = coordinator._shares[index, 1]
        lost = (bytes(messages.PIECE),) * 2 + kept.pieces[2:]
        coordinator._shares[index, 1] = messages.RoundShares(kept.seeds, lost, kept.commitments)

    coordinator, sites, vectors = lying_round(lie)

    assert run_round(coordinator, sites, vectors, round_number=1).total[0] == 1111111


def test_pair_seeds_that_were_never_sealed_void_the_round() -> None:
    def lie(coordinator: CoordinatorSession, _: dict[str, SiteSession], name: str) -> None:
        index = coordinator._names.index(name)
        kept = coordinator._shares[index, 1]
        coordinator._shares[index, 1] = messages.RoundShares(
            bytes(len(kept.seeds)), kept.pieces, kept.commitments
        )

    coordinator, sites, vectors = lying_round(lie)

    with pytest.raises(AggregationAborted, match="site-0000 did not answer"):
        run_round(coordinator, sites, vectors, round_number=1, drops={"site-0000": "begin"})


def test_a_message_twice_in_anothers_name_or_out_of_time_is_refused() -> None:
    coordinator, sites = make_sessions(4, length=8)
    names = sorted(sites)
    with pytest.raises(UpdateRejected, match="another site"):
        coordinator.add_key(names[0], sites[names[1]].key())
    with pytest.raises(UpdateRejected, match="not on the roster"):
        coordinator.add_key("nobody", sites[names[1]].key())
    coordinator.add_key(names[0], sites[names[0]].key())
    with pytest.raises(UpdateRejected, match="already"):
        coordinator.add_key(names[0], sites[names[0]].key())
    for name in names[1:]:
        coordinator.add_key(name, sites[name].key())
    for name, key_list in coordinator.key_list().items():
        coordinator.add_shares(name, sites[name].accept(key_list))
    for name, request in coordinator.open_round(1).items():
        sites[name].begin(request)
    update = sites[names[0]].mask(np.zeros(8, np.uint32))

    with pytest.raises(UpdateRejected, match="another site"):
        coordinator.add_update(names[1], update)
    coordinator.add_update(names[0], update)
    with pytest.raises(UpdateRejected, match="already"):
        coordinator.add_update(names[0], update)
    with pytest.raises(UpdateRejected, match="not asked"):
        coordinator.add_unmasking(names[0], b"")


def test_a_key_of_low_order_is_refused_at_once() -> None:
    coordinator, sites = make_sessions(3, length=8)
    name = min(sites)
    site = sites[name]
    statement = messages.Key.statement(site._digest, 0, bytes(32))
    key = messages.Key(0, bytes(32), site._identity.sign(statement))

    with pytest.raises(UpdateRejected, match="low order"):
        coordinator.add_key(name, key.encode(site._digest))


def test_sessions_never_show_a_secret() -> None:
    coordinator, sites = make_sessions(3, length=8)
    agree(coordinator, sites)

    for session in (coordinator, *sites.values()):
        assert "Session(" in repr(session) or "object at" in repr(session)
    site = next(iter(sites.values()))
    assert repr(site) == "SiteSession('site-0000')"
    assert "pairs" not in repr(site._agreement)
