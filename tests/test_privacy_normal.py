import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedward.privacy.mechanisms import normal
from fedward.privacy.mechanisms.normal import (
    RESOLUTION,
    NormalSteps,
    beyond,
    bricks,
    gaps,
)

FALSE_ALARM = 1e-9
DRAWS = 4_000_000
BRICKS = 1 << 16
WIDTH = 1 << 16  # whole numbers in a column


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture(scope="module")
def draws(rng: np.random.Generator) -> NDArray[np.int32]:
    drawn = np.empty(DRAWS, np.int32)
    NormalSteps(lambda words: fill(rng, words)).fill(drawn)
    return drawn


def fill(rng: np.random.Generator, words: NDArray[np.uint64]) -> None:
    words[:] = rng.integers(0, 2**64, words.size, dtype=np.uint64)


def normal_mass(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of what is rounded to `edges[i]` .. `edges[i + 1] - 1`, and of either end, by SciPy."""
    below = stats.norm.cdf((edges - 0.5) / RESOLUTION)
    return np.concatenate([below[:1], np.diff(below), 1 - below[-1:]])


def counted(drawn: NDArray[np.int32], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(edges, drawn, side="right"), minlength=edges.size + 1)


def test_bricks_have_one_mass_and_lie_below_the_density_and_boxes_above_it() -> None:
    table = bricks()
    first, bricks_of = np.unique(table.first, return_counts=True)
    column = np.searchsorted(table.left, first - 0.5)
    count = np.zeros(table.left.size)
    count[column] = bricks_of
    mass = (1 - table.rest) / BRICKS
    # Sixty-five places in each column, both edges among them.
    x = table.left[:, None] + np.linspace(0, WIDTH, 65)
    density = stats.norm.pdf(x / RESOLUTION) / RESOLUTION

    assert table.first.size == BRICKS
    assert np.array_equal(np.diff(first), np.full(first.size - 1, WIDTH))
    assert np.array_equal(first - 0.5, table.left[column])
    assert np.array_equal(np.diff(table.left), np.full(table.left.size - 1, WIDTH))
    assert np.allclose(count * mass / WIDTH, table.heights, rtol=1e-13, atol=0)
    assert (table.heights[:, None] <= density * (1 + 1e-12)).all()
    assert ((table.heights + table.tallest)[:, None] >= density * (1 - 1e-12)).all()
    assert 0 < table.rest < 0.01


def test_proposals_are_made_from_boxes_and_tails_by_their_masses() -> None:
    table = bricks()
    entries = np.bincount(table.boxes, minlength=table.left.size)
    boxes = float((table.tallest * WIDTH).sum())
    # Under an exponential with the slope of the density's logarithm where the tail begins.
    left, right = (
        stats.norm.pdf(t / RESOLUTION) * RESOLUTION / abs(t) for t in map(float, table.tails)
    )

    assert np.allclose(entries / table.tallest, (entries / table.tallest)[0], rtol=1e-12, atol=0)
    total = boxes + left + right
    assert table.shares == pytest.approx((boxes / total, (boxes + right) / total), rel=1e-12)
    assert table.tails == (table.left[0], table.left[-1] + WIDTH)


def test_draws_have_the_distribution_of_rounded_normal_ones(draws: NDArray[np.int32]) -> None:
    # Sixteen cells to a column, as far as a cell expects 20 draws.
    edges = np.arange(-260 * 16, 260 * 16 + 1, dtype=np.float64) * (WIDTH / 16)

    expected = DRAWS * normal_mass(edges)

    assert expected.min() > 20
    assert stats.chisquare(counted(draws, edges), expected).pvalue > FALSE_ALARM


def test_the_lowest_bits_are_uniform(draws: NDArray[np.int32]) -> None:
    for shift in (0, 6):
        counts = np.bincount((draws >> shift) & 1023, minlength=1024)

        assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_tails_are_those_of_the_normal_distribution(draws: NDArray[np.int32]) -> None:
    z = draws / RESOLUTION
    for bound in (3.0, 3.3437, 3.5, 4.0, 4.5, 4.9):
        for beyond_bound in (np.sum(z > bound), np.sum(z < -bound)):
            share = stats.norm.sf(bound)
            assert stats.binomtest(int(beyond_bound), DRAWS, share).pvalue > FALSE_ALARM


def test_what_is_in_no_brick_has_the_distribution_that_the_bricks_leave(
    rng: np.random.Generator,
) -> None:
    drawn = beyond(800_000, lambda words: fill(rng, words))
    table = bricks()
    edges = np.append(table.left, table.left[-1] + WIDTH) + 0.5

    left_over = normal_mass(edges)
    left_over[1:-1] -= table.heights * WIDTH

    assert (left_over > 0).all()
    assert left_over.sum() == pytest.approx(table.rest, rel=1e-9)
    expected = drawn.size * left_over / left_over.sum()
    # Together, from where fewer than 20 are expected.
    middle = expected > 20
    counts = counted(drawn, edges)
    assert middle.sum() > 500
    assert (
        stats.chisquare(
            [*counts[middle], counts[~middle].sum()], [*expected[middle], expected[~middle].sum()]
        ).pvalue
        > FALSE_ALARM
    )


def test_tails_beyond_the_columns_are_those_of_the_normal_distribution(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the table's own tails a test would see nothing: one draw in two million is there.
    table = bricks()
    monkeypatch.setattr(normal, "bricks", lambda: table._replace(shares=(1e-9, 0.5)))
    drawn = beyond(200_000, lambda words: fill(rng, words)) / RESOLUTION

    for tail, edge in ((drawn[drawn > 0], table.tails[1]), (-drawn[drawn < 0], -table.tails[0])):
        start = edge / RESOLUTION
        share = stats.norm.sf(tail) / stats.norm.sf(start)
        assert stats.kstest(share, "uniform").pvalue > FALSE_ALARM
        # Rejection keeps what lies below the density, by Marsaglia's envelope.
        kept = stats.norm.sf(start) / (stats.norm.pdf(start) / start)
        assert stats.binomtest(tail.size, 100_000, kept).pvalue > FALSE_ALARM


def test_each_draw_is_in_no_brick_independently(rng: np.random.Generator) -> None:
    drawn = gaps(200_000, lambda words: fill(rng, words))
    rest = bricks().rest

    longest = 600
    counts = np.bincount(np.minimum(drawn - 1, longest))
    chance = (1 - rest) ** np.arange(longest + 1)
    expected = np.append(chance[:-1] * rest, chance[-1])

    assert drawn.min() == 1
    assert stats.chisquare(counts, drawn.size * expected).pvalue > FALSE_ALARM
    correlation = float(np.corrcoef(drawn[:-1], drawn[1:])[0, 1])
    assert abs(correlation) < stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(drawn.size)


@pytest.mark.parametrize("size", [1, 3, 1_000, 200_000])
def test_requests_of_any_size_come_from_one_distribution(
    rng: np.random.Generator, size: int
) -> None:
    source = NormalSteps(lambda words: fill(rng, words))
    requests = [np.empty(size, np.int32) for _ in range(400_000 // size // (8 if size < 9 else 1))]

    for request in requests:
        source.fill(request)

    drawn = np.concatenate(requests) / RESOLUTION
    assert stats.kstest(drawn, "norm").pvalue > FALSE_ALARM
    for bound in (2.5, 3.3437):
        share = 2 * stats.norm.sf(bound)
        outside = int(np.sum(np.abs(drawn) > bound))
        assert stats.binomtest(outside, drawn.size, share).pvalue > FALSE_ALARM


def test_what_is_in_no_brick_is_used_once(rng: np.random.Generator) -> None:
    source = NormalSteps(lambda words: fill(rng, words))
    far = np.empty(0, np.int32)

    for size in (10, 50_000, 3, 200_000, 777, 300_000):
        drawn = np.empty(size, np.int32)
        source.fill(drawn)
        far = np.append(far, drawn[np.abs(drawn) > 3.4 * RESOLUTION])

    # Beyond the last brick, of 370 among some 10^7 whole numbers fewer than ten meet by chance.
    assert far.size > 200
    assert far.size - np.unique(far).size < 10


@pytest.mark.parametrize("size", [0, 1, 2, 3, 32_767, 32_768, 32_769])
def test_all_of_the_memory_is_filled(rng: np.random.Generator, size: int) -> None:
    nothing = np.iinfo(np.int32).min
    drawn = np.full(size + 1, nothing, np.int32)

    NormalSteps(lambda words: fill(rng, words)).fill(drawn[:size])

    assert (drawn[:size] != nothing).all()
    assert drawn[size] == nothing


def test_nothing_of_a_draw_is_left_behind(rng: np.random.Generator) -> None:
    steps = NormalSteps(lambda words: fill(rng, words))
    drawn = np.empty(40_000, np.int32)

    steps.fill(drawn)

    kept = {name: v for name, v in vars(steps).items() if isinstance(v, np.ndarray)}
    assert set(kept) == {"_word", "_brick", "_places", "_values"}
    assert not np.any(kept["_word"])
    assert not np.any(kept["_brick"])
    # Of what was made ahead the draws to come are left, and zeros where the last ones were.
    made = kept["_values"].base
    assert made is not None
    used = made[: -kept["_values"].size]
    assert used.size > 300
    assert not np.any(used)
    assert (kept["_places"] >= 0).all()
