import numpy as np
import pytest

from fedward.privacy.mechanisms.encoding import FixedPoint
from fedward.privacy.mechanisms.stream import BitStream
from fedward.privacy.secagg import audit
from fedward.privacy.secagg.rounds import agree, make_sessions, run_round

LENGTH = 400


def test_groups_are_disjoint_large_enough_and_hold_everybody() -> None:
    sites = [f"site-{number}" for number in range(11)]

    found = audit.groups(sites, min_sites=3)

    assert len(found) == 3
    assert all(len(members) >= 3 for members in found)
    assert sorted(name for members in found for name in members) == sorted(sites)


def test_too_few_sites_make_no_audit() -> None:
    with pytest.raises(ValueError, match="no two groups"):
        audit.groups(["a", "b", "c", "d", "e"], min_sites=3)
    with pytest.raises(ValueError, match="3 sites or more"):
        audit.groups(["a", "b", "c", "d"], min_sites=2)


def test_the_group_of_a_site_that_sends_nonsense_is_named_and_no_other() -> None:
    rng = np.random.default_rng(2)
    fixed, bits = FixedPoint.choose(bound=100.0, sites=3, length=LENGTH), BitStream.secure()
    sums = {}
    for group in range(3):
        coordinator, sites = make_sessions(3, length=LENGTH)
        agree(coordinator, sites)
        vectors = {}
        for name in sites:
            vector = rng.standard_normal(LENGTH)
            vector /= np.linalg.norm(vector)
            if group == 1 and name == min(sites):
                vector = np.full(LENGTH, 50.0)
            vectors[name] = fixed.encode(vector, bits=bits)
        total = run_round(coordinator, sites, vectors, round_number=1).total
        sums[tuple(f"{group}-{name}" for name in sites)] = fixed.decode(total)

    found = audit.suspects(sums, clip_norm=1.0, granularity=fixed.granularity)

    assert [members[0][0] for members in found] == ["1"]


def test_noise_alone_raises_no_alarm() -> None:
    rng = np.random.default_rng(6)
    sums: dict[tuple[str, ...], np.ndarray] = {
        (str(group), "b", "c"): rng.standard_normal(LENGTH) * 5.0 * np.sqrt(3)
        for group in range(200)
    }

    assert audit.suspects(sums, clip_norm=1e-9, noise_std=5.0) == []
    assert len(audit.suspects(sums, clip_norm=1e-9, noise_std=2.5)) == 200
