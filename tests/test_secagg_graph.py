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
    draws = 4000
    # Around the ring: 1 is dishonest, 2 has dropped out.
    status = rng.permuted(np.tile([1] * 16 + [2] * 16 + [0] * 48, (draws, 1)), axis=1)
    steps = [step for step in range(-degree.neighbors // 2, degree.neighbors // 2 + 1) if step]
    beside = np.stack([np.roll(status, step, axis=1) for step in steps])
    many = ((beside == 1).sum(axis=0) >= degree.threshold).any(axis=1)
    left = degree.neighbors + 1 - (beside == 2).sum(axis=0)
    void = (left < degree.threshold).any(axis=1)
    # Hoeffding at 1e-9.
    slack = math.sqrt(math.log(1e9) / (2 * draws))
    assert many.mean() < 2**degree.collusion + slack
    assert void.mean() < 2**degree.failure + slack


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
