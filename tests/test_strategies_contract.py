"""What every strategy must do, whatever it is."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedward.core.errors import ConfigError
from fedward.strategies.averaging import IterateAverage
from fedward.strategies.fedavg import FedAvg
from fedward.strategies.registry import STRATEGIES, make_strategy
from fedward.strategies.strategy import State, Strategy

SIZE = 5
every_strategy = pytest.mark.parametrize("build", STRATEGIES.values(), ids=list(STRATEGIES))
Updates = list[tuple[NDArray[np.float32], float]]


def _updates(seed: int, count: int) -> Updates:
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=SIZE).astype(np.float32), float(rng.uniform(1, 300))) for _ in range(count)
    ]


def _run(strategy: Strategy, state: State, updates: Updates) -> State:
    for update, weight in updates:
        state = strategy.fold(state, update, weight)
    return strategy.finish(state)


@every_strategy
@given(seed=st.integers(0, 2**32), count=st.integers(1, 9), order=st.randoms())
def test_the_order_of_replies_does_not_matter(
    build: Callable[..., Strategy], seed: int, count: int, order: random.Random
) -> None:
    strategy, updates = build(), _updates(seed, count)
    start = np.ones(SIZE, np.float32)
    shuffled = list(updates)
    order.shuffle(shuffled)

    one = _run(strategy, strategy.init(start), updates).parameters
    other = _run(strategy, strategy.init(start), shuffled).parameters

    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@every_strategy
def test_sites_that_do_not_move_leave_the_model_where_it_is(
    build: Callable[..., Strategy],
) -> None:
    strategy = build()
    start = np.arange(SIZE, dtype=np.float32)

    state = _run(strategy, strategy.init(start), [(np.zeros(SIZE, np.float32), 3.0)] * 4)

    np.testing.assert_array_equal(state.parameters, start)


@every_strategy
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(build: Callable[..., Strategy], weight: float) -> None:
    strategy = build()

    with pytest.raises(ValueError, match="weight"):
        strategy.fold(strategy.init(np.zeros(SIZE, np.float32)), np.ones(SIZE, np.float32), weight)


@every_strategy
def test_an_update_of_another_shape_is_refused(build: Callable[..., Strategy]) -> None:
    strategy = build()

    with pytest.raises(ValueError, match="shape"):
        strategy.fold(strategy.init(np.zeros(SIZE, np.float32)), np.ones(1, np.float32), 1.0)


@every_strategy
def test_a_round_without_updates_has_no_result(build: Callable[..., Strategy]) -> None:
    strategy = build()

    with pytest.raises(ValueError, match="no update"):
        strategy.finish(strategy.init(np.zeros(SIZE, np.float32)))


@every_strategy
def test_finishing_leaves_nothing_of_the_round_behind(build: Callable[..., Strategy]) -> None:
    strategy = build()

    state = _run(strategy, strategy.init(np.zeros(SIZE, np.float32)), _updates(1, 3))

    assert state.total is None
    assert state.weight == 0


@given(seed=st.integers(0, 2**32), count=st.integers(1, 9), rate=st.floats(0.1, 2))
def test_fedavg_moves_by_the_weighted_mean(seed: int, count: int, rate: float) -> None:
    updates = _updates(seed, count)
    strategy = FedAvg(server_learning_rate=rate)
    vectors, weights = zip(*updates, strict=True)

    moved = _run(strategy, strategy.init(np.zeros(SIZE, np.float32)), updates).parameters

    expected = rate * np.average(np.stack(vectors).astype(float), axis=0, weights=weights)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)


@given(share=st.floats(0, 0.99), rounds=st.integers(1, 60), seed=st.integers(0, 99))
def test_the_average_is_the_mean_of_the_last_models(share: float, rounds: int, seed: int) -> None:
    models = np.random.default_rng(seed).normal(size=(rounds, 3)).astype(np.float32)
    average = IterateAverage.over_last(share, rounds=rounds)

    for number, model in enumerate(models, start=1):
        average = average.add(model, round_number=number)

    last = max(1, rounds - int(rounds * (1 - share)))
    np.testing.assert_allclose(
        average.released(models[-1]), models[-last:].mean(axis=0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "args"),
    [("fedaverage", {}), ("fedavg", {"momentum": 1}), ("fedavg", {"server_learning_rate": 0})],
)
def test_a_strategy_that_cannot_be_built_is_explained(
    name: str, args: dict[str, str | int | float | bool]
) -> None:
    with pytest.raises(ConfigError, match=r"\[strategy"):
        make_strategy(name, args)
