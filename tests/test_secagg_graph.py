import math

import numpy as np
import pytest

from fedward.privacy.secagg import choose_degree
from fedward.privacy.secagg.graph import ring_holders


@pytest.mark.parametrize("sites", [100, 300, 1000])
def test_the_chosen_degree_meets_what_was_asked_and_two_less_does_not(sites: int) -> None:
    degree = choose_degree(sites)

    assert degree.collusion <= -40
    assert degree.failure <= -20
    assert degree.neighbors % 2 == 0
    assert degree.threshold > (degree.neighbors + 1) / 2
    assert choose_degree(sites, collusion_bits=-degree.collusion + 1).neighbors >= degree.neighbors
    # Logarithmic in the number of sites, not linear.
    assert degree.neighbors < 15 * math.log2(sites)


def test_the_bounds_hold_in_simulation() -> None:
    # With weak demands the failures are frequent enough to count.
    sites, bits = 80, 3.0
    degree = choose_degree(
        sites, dishonest=0.2, dropout=0.2, collusion_bits=bits, failure_bits=bits
    )
    rng = np.random.default_rng(5)
    draws, broken, void = 4000, 0, 0
    for _ in range(draws):
        ring = rng.permutation(sites)
        holders = ring_holders([int(site) for site in ring], degree.neighbors)
        status = np.zeros(sites, int)
        status[:16], status[16:32] = 1, 2  # dishonest, dropped
        others = [[holder for holder in holders[site] if holder != site] for site in range(sites)]
        many = any((status[other] == 1).sum() >= degree.threshold for other in others)
        gone = any(
            (status[other] == 2).sum() > len(other) + 1 - degree.threshold for other in others
        )
        broken, void = broken + many, void + gone
    # Hoeffding at 1e-9.
    slack = math.sqrt(math.log(1e9) / (2 * draws))
    assert broken / draws < 2**degree.collusion + slack
    assert void / draws < 2**degree.failure + slack


def test_a_ring_gives_each_site_its_nearest_and_is_symmetric() -> None:
    holders = ring_holders([3, 1, 4, 0, 2, 5], 2)

    assert holders[4] == (0, 1, 4)
    assert holders[3] == (1, 3, 5)
    assert all(site in holders[other] for site in holders for other in holders[site])


def test_impossible_demands_are_refused() -> None:
    with pytest.raises(ValueError, match="no degree below 9"):
        choose_degree(10, dishonest=0.4, dropout=0.4)
    with pytest.raises(ValueError, match="fewer than all"):
        choose_degree(10, dishonest=0.5, dropout=0.5)
