"""Whom a site shares masks with when there are too many sites for everybody with everybody.

Bell, Bonawitz, Gascón, Lepoint and Raykova, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", CCS 2020: a Harary graph of degree k over a random order of the
sites, against a coordinator that keeps to the protocol.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_LOG2 = math.log(2)


def ring_holders(ring: Sequence[int], neighbors: int) -> dict[int, tuple[int, ...]]:
    """Each site of a ring with its `neighbors / 2` nearest on either side, in order of index."""
    half, count = neighbors // 2, len(ring)
    return {
        site: tuple(sorted({ring[(at + step) % count] for step in range(-half, half + 1)}))
        for at, site in enumerate(ring)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Degree:
    """A graph's degree and threshold, and how likely they fail.

    Attributes:
        neighbors: k, the number of other sites that a site shares masks with.
        threshold: Shares needed, of the k + 1 holders.
        collusion: log2 of a bound on the probability that dishonest sites learn more than the sum
            of all honest survivors.
        failure: log2 of a bound on the probability that a round is void though no more than the
            stated share of sites dropped out.
    """

    neighbors: int
    threshold: int
    collusion: float
    failure: float


def choose_degree(
    sites: int,
    *,
    dishonest: float = 0.1,
    dropout: float = 0.1,
    collusion_bits: float = 40,
    failure_bits: float = 20,
) -> Degree:
    """The smallest degree that meets the wanted probabilities.

    Union bounds after Bell et al. 2020, definition 3.1 and theorem 3.10:
    a site with `threshold` or more dishonest holders (its two secrets could both be rebuilt);
    k/2 neighbours in a row all dishonest or dropped (the honest could be cut in two, and each part
    summed by itself); a site with fewer than `threshold` holders left.

    Args:
        sites: Number of sites.
        dishonest: The share of sites that may collude with the coordinator.
        dropout: The share of sites that may drop out of a round.
        collusion_bits: The first two happen with probability below 2^-this.
        failure_bits: The third happens with probability below 2^-this.

    Raises:
        ValueError: No degree below the number of other sites meets them.
    """
    bad, gone = math.floor(dishonest * sites), math.floor(dropout * sites)
    if not 0 <= bad + gone < sites:
        raise ValueError("dishonest and dropped sites together must be fewer than all")
    for neighbors in range(4, sites - 1, 2):
        log_cut = math.log(sites) + _log_run(sites, bad + gone, neighbors // 2)
        if log_cut > -collusion_bits * _LOG2:
            continue
        for threshold in range((neighbors + 1) // 2 + 1, neighbors + 2):
            log_many = math.log(sites) + _log_at_least(sites - 1, bad, neighbors, threshold)
            collusion = _log_sum(log_cut, log_many) / _LOG2
            if collusion > -collusion_bits:
                continue
            # Void if, of a site's k neighbours, more than k + 1 - threshold are gone.
            too_many = neighbors + 2 - threshold
            failure = (
                math.log(sites) + _log_at_least(sites - 1, gone, neighbors, too_many)
            ) / _LOG2
            if failure <= -failure_bits:
                return Degree(
                    neighbors=neighbors, threshold=threshold, collusion=collusion, failure=failure
                )
            break  # a larger threshold only fails more often
    raise ValueError(
        f"no degree below {sites - 1} meets 2^-{collusion_bits:g} and 2^-{failure_bits:g} with "
        f"{dishonest:.0%} dishonest and {dropout:.0%} dropped; lower one, or use the complete graph"
    )


def _log_choose(total: int, chosen: int) -> float:
    if not 0 <= chosen <= total:
        return -math.inf
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)


def _log_sum(*terms: float) -> float:
    top = max(terms)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(term - top) for term in terms))


def _log_at_least(total: int, marked: int, drawn: int, least: int) -> float:
    """Log P[hypergeometric >= least]: of `drawn` out of `total`, how many are marked."""
    terms = [
        _log_choose(marked, k) + _log_choose(total - marked, drawn - k) - _log_choose(total, drawn)
        for k in range(least, min(drawn, marked) + 1)
    ]
    return min(0.0, _log_sum(*terms)) if terms else -math.inf


def _log_run(total: int, marked: int, run: int) -> float:
    """Log P[the `run` sites after a given one on a random ring are all marked]."""
    if run > marked:
        return -math.inf
    return _log_choose(marked, run) - _log_choose(total - 1, run)
