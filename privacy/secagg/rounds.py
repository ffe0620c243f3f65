"""Key agreement and rounds with all sites in one process: for tests, benchmarks and as an example.

This is all that a runtime has to do: carry bytes, tolerate silence, and go on when a message is
rejected.
"""

from collections.abc import Callable, Mapping
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from fedward.core.identity import Identity, PublicIdentity
from fedward.privacy.secagg.coordinator import CoordinatorSession, RoundSum
from fedward.privacy.secagg.site import SiteSession
from fedward.privacy.secagg.terms import Adversary, Terms

Step = Literal["keys", "begin", "update", "confirm", "unmask"]
STEPS: Final[tuple[Step, ...]] = ("keys", "begin", "update", "confirm", "unmask")
_STUDY: Final = "5e" * 32


def make_sessions(
    count: int,
    *,
    length: int,
    adversary: Adversary = "malicious",
    threshold: int | None = None,
    min_sites: int = 3,
    neighbors: int | None = None,
    threads: int | None = None,
) -> tuple[CoordinatorSession, dict[str, SiteSession]]:
    """A coordinator and `count` sites with new identities, before they agree on keys."""
    identities = {f"site-{number:04d}": Identity.generate_site() for number in range(count)}
    roster: dict[str, PublicIdentity] = {name: own.public for name, own in identities.items()}
    terms = Terms.propose(
        study=_STUDY,
        roster=roster,
        length=length,
        adversary=adversary,
        threshold=threshold,
        min_sites=min_sites,
        neighbors=neighbors,
    )
    sites = {
        name: SiteSession(
            terms,
            name=name,
            identity=identity,
            roster=roster,
            study=_STUDY,
            min_sites=min_sites,
            threads=threads,
        )
        for name, identity in identities.items()
    }
    return CoordinatorSession(terms, roster=roster, threads=threads), sites


def agree(
    coordinator: CoordinatorSession,
    sites: Mapping[str, SiteSession],
    *,
    absent: frozenset[str] = frozenset(),
) -> None:
    """Agree on keys, once a run; sites in `absent` never answer.

    Raises:
        AggregationAborted: Too few sites are present.
    """
    for name, site in sites.items():
        if name not in absent:
            coordinator.add_key(name, site.key())
    for name, message in coordinator.key_list().items():
        coordinator.add_shares(name, sites[name].accept(message))


def run_round(
    coordinator: CoordinatorSession,
    sites: Mapping[str, SiteSession],
    vectors: Mapping[str, NDArray[np.uint32]],
    *,
    round_number: int,
    drops: Mapping[str, Step] | None = None,
) -> RoundSum:
    """One round.

    Args:
        coordinator: After `agree`.
        sites: After `agree`.
        vectors: Each site's vector, shape `(length,)`.
        round_number: Larger than every round's before.
        drops: From which step on a site is silent; others never are.

    Returns:
        The sum of the survivors' vectors.

    Raises:
        AggregationAborted: Too few sites are left at some step.
    """
    silent_from = {name: STEPS.index(step) for name, step in (drops or {}).items()}

    def ask(
        step: Step,
        requests: Mapping[str, bytes],
        answer: Callable[[SiteSession, bytes, str], bytes | memoryview],
        take: Callable[[str, bytes | memoryview], None],
    ) -> None:
        for name, request in requests.items():
            if silent_from.get(name, len(STEPS)) > STEPS.index(step):
                take(name, answer(sites[name], request, name))

    def masked(site: SiteSession, request: bytes, name: str) -> bytes | memoryview:
        site.begin(request)
        return site.mask(vectors[name])

    ask(
        "keys",
        coordinator.shares_request(round_number),
        lambda site, request, _: site.shares(request),
        lambda name, reply: coordinator.add_shares(name, bytes(reply)),
    )
    # A site that is silent from "update" on has begun and trained, and then is gone.
    requests = coordinator.open_round(round_number)
    for name, step in silent_from.items():
        if step == STEPS.index("update") and name in requests:
            sites[name].begin(requests[name])
    ask("update", requests, masked, coordinator.add_update)
    ask(
        "confirm",
        coordinator.close_updates(),
        lambda site, request, _: site.confirm(request),
        lambda name, reply: coordinator.add_confirmation(name, bytes(reply)),
    )
    requests = coordinator.unmask_requests()
    for name, request in requests.items():
        began = sites[name].round_number == round_number
        if began and silent_from.get(name, len(STEPS)) > STEPS.index("unmask"):
            coordinator.add_unmasking(name, sites[name].unmask(request))
    return coordinator.finish()
