"""Two attacks that work on Flower 1.41's SecAgg+, as attacker's code against ours.

Each succeeds on a copy of ours that was weakened in the way Flower is, and fails on ours.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from fedward.core.errors import UpdateRejected
from fedward.privacy.secagg import CoordinatorSession, SiteSession, keys, messages, shamir
from fedward.privacy.secagg.masks import Mask, apply_masks
from fedward.privacy.secagg.rounds import agree, make_sessions
from fedward.privacy.secagg.site import Standing

COUNT, LENGTH, FOLDED_BITS = 3, 64, 10
SMALL = 2**16  # an attacker knows that an encoded update is small


def folded(seed: bytes) -> bytes:
    """Flower XORs a seed's words into one of 32 bits; here fewer, for the test's sake."""
    word = 0
    for at in range(0, len(seed), 4):
        word ^= int.from_bytes(seed[at : at + 4], "little")
    return candidate(word % 2**FOLDED_BITS)


def candidate(number: int) -> bytes:
    return number.to_bytes(32, "little")


class ShortSeeds(SiteSession):
    """Weakened: the pair seeds are folded."""

    def _pair_seed(self, other: int, number: int) -> bytes:
        return folded(super()._pair_seed(other, number))


class GivesBoth(SiteSession):
    """Weakened: answers for any list, and again for another."""

    def _check_signatures(self, current: Standing, asked: messages.UnmaskRequest) -> None: ...

    def _check_survivors(self, current: Standing, number: int, survivors: frozenset[int]) -> None:
        super()._check_survivors(dataclasses.replace(current, unmasked=False), number, survivors)


def masked_round(
    kind: type[SiteSession], count: int
) -> tuple[CoordinatorSession, list[SiteSession], list[np.ndarray], list[np.ndarray]]:
    """A round up to the masked vectors: the sessions, the vectors and what the coordinator got."""
    coordinator, by_name = make_sessions(count, length=LENGTH)
    for session in by_name.values():
        session.__class__ = kind
    agree(coordinator, by_name)
    rng = np.random.default_rng()
    vectors = [rng.integers(0, SMALL, LENGTH, dtype=np.uint32) for _ in range(count)]
    received = []
    for (name, request), vector in zip(
        sorted(coordinator.open_round(1).items()), vectors, strict=True
    ):
        by_name[name].begin(request)
        message = by_name[name].mask(vector)
        coordinator.add_update(name, message)
        received.append(np.frombuffer(message[-4 * LENGTH :], dtype="<u4").copy())
    return coordinator, [by_name[name] for name in sorted(by_name)], vectors, received


def stream(seed: bytes, length: int) -> np.ndarray:
    vector = np.zeros(length, np.uint32)
    apply_masks(vector, [Mask(seed)])
    return vector


def attack_by_guessing(vector: np.ndarray) -> np.ndarray | None:
    """An honest-but-curious coordinator: the self-mask is off already; guess the pair seeds.

    Site 0 adds both of its pair masks.
    """
    heads = np.stack([stream(candidate(number), 4) for number in range(2**FOLDED_BITS)])
    for first in range(2**FOLDED_BITS):
        rest = vector[:4] - heads[first] - heads
        for second in np.flatnonzero((rest < SMALL).all(axis=1)):
            pair = stream(candidate(first), LENGTH), stream(candidate(int(second)), LENGTH)
            found: np.ndarray = vector - pair[0] - pair[1]
            return found
    return None


def without_self_mask(
    coordinator: CoordinatorSession, sites: list[SiteSession], masked: np.ndarray
) -> np.ndarray:
    """What a coordinator that follows the protocol holds of site 0 after unmasking."""
    coordinator.close_updates()
    names = [f"site-{index:04d}" for index in range(COUNT)]
    requests = coordinator.unmask_requests()
    shares = [
        messages.Unmasking.decode(
            site.unmask(requests[name]),
            context=requests[name][6:38],
            sites=COUNT,
            sender="",
        ).shares[0]
        for name, site in zip(names, sites, strict=True)
    ]
    secret = shamir.combine(shares, shamir.weights([1, 2, 3]))
    found: np.ndarray = masked - stream(secret, LENGTH)
    return found


@pytest.mark.parametrize(("kind", "succeeds"), [(ShortSeeds, True), (SiteSession, False)])
def test_guessing_short_seeds(kind: type[SiteSession], succeeds: bool) -> None:
    coordinator, sites, vectors, received = masked_round(kind, COUNT)

    found = attack_by_guessing(without_self_mask(coordinator, sites, received[0]))

    # A false alarm takes four words below 2^16 by chance: 2^20 guesses of 2^-64 each.
    assert (found is not None and np.array_equal(found, vectors[0])) is succeeds
    assert (found is None) is not succeeds


def attack_by_both_lists(
    coordinator: CoordinatorSession,
    sites: list[SiteSession],
    masked: list[np.ndarray],
    *,
    apart: bool,
) -> np.ndarray:
    """A lying coordinator lists site 0 as a survivor and as a dropout, and unmasks it.

    With `apart`, each list goes to half of the sites, as a site that compares its own lists sees
    nothing.
    """
    count, target = len(sites), 0
    context = sites[0]._agreed().context
    everyone = frozenset(range(count))
    signatures = coordinator._round.signatures if coordinator._round else {}
    found: dict[bool, dict[int, bytes]] = {True: {}, False: {}}
    for index, active in itertools.product(range(count), (True, False)):
        if (apart and active is (index % 2 == 0)) or (index == target and not active):
            continue
        pieces = {d: coordinator._shares[d, 1].pieces[index] for d in range(count)}
        survivors = everyone if active else everyone - {target}
        request = messages.UnmaskRequest(1, survivors, signatures if active else {}, pieces)
        reply = sites[index].unmask(request.encode(context, sites=count))
        shares = messages.Unmasking.decode(reply, context=context, sites=count, sender="").shares
        found[active][index] = shares[target]
    threshold = coordinator._terms.threshold
    secret = {}
    for active, shares in found.items():
        holders = sorted(shares)[:threshold]
        lagrange = shamir.weights([holder + 1 for holder in holders])
        secret[active] = shamir.combine([shares[holder] for holder in holders], lagrange)
    seeds = keys.unseal(secret[False], coordinator._shares[target, 1].seeds)
    if seeds is None:
        raise UpdateRejected(site="site-0000", reason="too few shares of the pair seeds")
    vector: np.ndarray = masked[target] - stream(secret[True], LENGTH)
    for at in range(0, len(seeds), 32):
        vector = vector - stream(seeds[at : at + 32], LENGTH)
    return vector


def test_listing_a_site_as_active_and_as_dropped() -> None:
    coordinator, sites, vectors, masked = masked_round(GivesBoth, 4)
    assert np.array_equal(attack_by_both_lists(coordinator, sites, masked, apart=False), vectors[0])

    coordinator, sites, _, masked = masked_round(SiteSession, 4)
    with pytest.raises(UpdateRejected):
        attack_by_both_lists(coordinator, sites, masked, apart=False)


def test_listing_it_differently_to_each_half() -> None:
    # Of half of four sites two shares come, of three that are needed, even from the weakened one.
    for kind in (GivesBoth, SiteSession):
        coordinator, sites, _, masked = masked_round(kind, 4)
        with pytest.raises(UpdateRejected):
            attack_by_both_lists(coordinator, sites, masked, apart=True)
