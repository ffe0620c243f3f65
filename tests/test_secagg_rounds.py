import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedward.core.errors import AggregationAborted, UpdateRejected
from fedward.privacy.secagg import Adversary, SiteSession, least_threshold
from fedward.privacy.secagg.rounds import STEPS, Step, agree, make_sessions, run_round

ADVERSARIES: tuple[Adversary, ...] = ("malicious", "honest-but-curious")
LENGTH = 9


def vectors_of(sites: dict[str, SiteSession], *, length: int = LENGTH) -> dict[str, np.ndarray]:
    rng = np.random.default_rng()
    return {name: rng.integers(0, 2**32, length, dtype=np.uint32) for name in sites}


def plain_sum(vectors: dict[str, np.ndarray], survivors: tuple[str, ...]) -> np.ndarray:
    total: np.ndarray = np.stack([vectors[name] for name in survivors]).sum(axis=0, dtype=np.uint32)
    return total


@settings(deadline=None, max_examples=40)
@given(data=st.data(), count=st.integers(3, 7), adversary=st.sampled_from(ADVERSARIES))
def test_the_sum_is_exact_for_any_inputs_and_any_dropouts_that_the_threshold_allows(
    data: st.DataObject, count: int, adversary: Adversary
) -> None:
    coordinator, sites = make_sessions(count, length=LENGTH, adversary=adversary)
    names = sorted(sites)
    allowed = count - max(3, least_threshold(count, adversary))
    never = data.draw(st.lists(st.sampled_from(names), max_size=allowed, unique=True))
    agree(coordinator, sites, absent=frozenset(never))

    for round_number in (1, 2, 5):
        left = [name for name in names if name not in never]
        silent = data.draw(
            st.lists(st.sampled_from(left), max_size=allowed - len(never), unique=True)
        )
        drops: dict[str, Step] = {name: data.draw(st.sampled_from(STEPS[1:])) for name in silent}
        vectors = {
            name: data.draw(hnp.arrays(np.uint32, LENGTH, elements=st.integers(0, 2**32 - 1)))
            for name in names
        }

        result = run_round(coordinator, sites, vectors, round_number=round_number, drops=drops)

        late = {name for name, step in drops.items() if step in ("begin", "update")}
        assert set(result.survivors) == set(left) - late
        assert np.array_equal(result.total, plain_sum(vectors, result.survivors))
        assert result.disputes == ()


@settings(deadline=None, max_examples=25)
@given(data=st.data(), count=st.integers(3, 7), adversary=st.sampled_from(ADVERSARIES))
def test_one_dropout_too_many_voids_the_round_at_every_step(
    data: st.DataObject, count: int, adversary: Adversary
) -> None:
    coordinator, sites = make_sessions(count, length=LENGTH, adversary=adversary)
    agree(coordinator, sites)
    threshold = max(3, least_threshold(count, adversary))
    silent = data.draw(st.permutations(sorted(sites)))[: count - threshold + 1]
    # Sites that drop out only when nobody needs to confirm still unmask; so begin earlier.
    step: Step = data.draw(st.sampled_from(["begin", "update", "unmask"]))
    vectors = vectors_of(sites)
    if threshold > least_threshold(count, adversary) and step == "unmask":
        step = "update"  # shares of fewer than min_sites may still suffice

    with pytest.raises(AggregationAborted) as caught:
        run_round(coordinator, sites, vectors, round_number=1, drops=dict.fromkeys(silent, step))

    assert set(caught.value.missing) >= set(silent)
    # The next round is whole again.
    result = run_round(coordinator, sites, vectors, round_number=2)
    assert np.array_equal(result.total, plain_sum(vectors, tuple(sorted(sites))))


def test_a_key_agreement_of_too_few_is_void() -> None:
    coordinator, sites = make_sessions(4, length=LENGTH)

    with pytest.raises(AggregationAborted):
        agree(coordinator, sites, absent=frozenset(sorted(sites)[:2]))


def test_too_few_confirmations_void_the_round() -> None:
    coordinator, sites = make_sessions(7, length=LENGTH)
    agree(coordinator, sites)
    names = sorted(sites)
    drops: dict[str, Step] = {names[0]: "update", names[1]: "confirm", names[2]: "confirm"}

    with pytest.raises(AggregationAborted):
        run_round(coordinator, sites, vectors_of(sites), round_number=1, drops=drops)


def test_nobody_dropped_out_costs_two_exchanges_and_a_dropout_three() -> None:
    coordinator, sites = make_sessions(4, length=LENGTH)
    agree(coordinator, sites)
    assert coordinator.shares_request(1) == {}
    for name, request in coordinator.open_round(1).items():
        sites[name].begin(request)
        coordinator.add_update(name, sites[name].mask(np.zeros(LENGTH, np.uint32)))
    assert coordinator.close_updates() == {}

    names = sorted(sites)
    for name, request in coordinator.open_round(2).items():
        sites[name].begin(request)
        if name != names[0]:
            coordinator.add_update(name, sites[name].mask(np.zeros(LENGTH, np.uint32)))
    assert sorted(coordinator.close_updates()) == names[1:]


def test_a_late_site_helps_to_unmask_the_others() -> None:
    coordinator, sites = make_sessions(4, length=LENGTH)
    agree(coordinator, sites)
    vectors, names = vectors_of(sites), sorted(sites)
    requests = coordinator.open_round(1)
    for name in names:
        sites[name].begin(requests[name])
    late = sites[names[3]].mask(vectors[names[3]])
    for name in names[:3]:
        coordinator.add_update(name, sites[name].mask(vectors[name]))
    for name, request in coordinator.close_updates().items():
        coordinator.add_confirmation(name, sites[name].confirm(request))
    with pytest.raises(UpdateRejected):
        coordinator.add_update(names[3], late)

    requests = coordinator.unmask_requests()
    for name in names[1:]:  # the first survivor is gone, the late site answers instead
        coordinator.add_unmasking(name, sites[name].unmask(requests[name]))
    result = coordinator.finish()

    assert np.array_equal(result.total, plain_sum(vectors, tuple(names[:3])))


def test_a_site_that_was_away_for_long_comes_back() -> None:
    coordinator, sites = make_sessions(4, length=LENGTH)
    agree(coordinator, sites)
    vectors, names = vectors_of(sites), sorted(sites)
    for round_number in range(1, 9):
        run_round(coordinator, sites, vectors, round_number=round_number, drops={names[1]: "keys"})

    result = run_round(coordinator, sites, vectors, round_number=9)

    assert result.survivors == tuple(names)
    assert np.array_equal(result.total, plain_sum(vectors, result.survivors))


def test_a_masked_vector_takes_four_bytes_a_parameter_and_a_bounded_rest() -> None:
    coordinator, sites = make_sessions(10, length=100_000)
    agree(coordinator, sites)
    requests = coordinator.open_round(1)
    site = sites["site-0003"]
    site.begin(requests["site-0003"])

    message = site.mask(np.zeros(100_000, np.uint32))

    assert len(message) - 400_000 < 2_000
    assert len(requests["site-0003"]) < 100


def test_a_hundred_sites_use_a_sparse_graph_and_the_sum_is_exact() -> None:
    coordinator, sites = make_sessions(
        100, length=LENGTH, adversary="honest-but-curious", neighbors=20, threshold=12, min_sites=50
    )
    agree(coordinator, sites)
    vectors, names = vectors_of(sites), sorted(sites)
    drops: dict[str, Step] = {names[3]: "begin", names[50]: "update", names[77]: "unmask"}

    result = run_round(coordinator, sites, vectors, round_number=1, drops=drops)

    assert set(result.survivors) == set(names) - {names[3], names[50]}
    assert np.array_equal(result.total, plain_sum(vectors, result.survivors))
