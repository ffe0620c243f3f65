import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedward.privacy.mechanisms.normal import (
    RESOLUTION,
    Uncovered,
    bricks,
    draw_normal,
    put,
)

FALSE_ALARM = 1e-9
DRAWS = 4_000_000
BRICKS = 1 << 16
WIDTH = 1 << 16  # whole numbers in a column
NOTHING = np.iinfo(np.int32).min


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture(scope="module")
def draws(rng: np.random.Generator) -> NDArray[np.int32]:
    drawn = np.empty(DRAWS, np.int32)
    draw_normal(drawn, lambda words: fill(rng, words))
    return drawn


@pytest.fixture(scope="module")
def uncovered(rng: np.random.Generator) -> NDArray[np.int32]:
    """Draws in no brick in their places, and `NOTHING` in the others."""
    drawn = np.full(50_000_000, NOTHING, np.int32)
    place = -1
    while place < drawn.size:
        words = rng.integers(0, 2**64, 1 << 20, dtype=np.uint64)
        place = put_beyond(words, bricks().uncovered, drawn, place)
    return drawn


def put_beyond(
    words: NDArray[np.uint64], table: Uncovered, out: NDArray[np.int32], place: int
) -> int:
    """`put` where bricks put nothing; in the same column's place there is `NOTHING`."""
    none = np.zeros(out.size, np.uint32)
    nothing = np.full(BRICKS, NOTHING // WIDTH, np.int16)
    return put(none, nothing, words, *table, out, place)


def fill(rng: np.random.Generator, words: NDArray[np.uint64]) -> None:
    words[:] = rng.integers(0, 2**64, words.size, dtype=np.uint64)


def normal_mass(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of what is rounded to `edges[i]` .. `edges[i + 1] - 1`, and of either end, by SciPy."""
    below = stats.norm.cdf((edges - 0.5) / RESOLUTION)
    return np.concatenate([below[:1], np.diff(below), 1 - below[-1:]])


def counted(drawn: NDArray[np.int32], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(edges, drawn, side="right"), minlength=edges.size + 1)


def test_bricks_have_one_mass_and_lie_below_the_density_and_boxes_above_it() -> None:
    table, rest = bricks(), bricks().uncovered
    column, bricks_of = np.unique(table.column.astype(np.int64), return_counts=True)
    at = np.searchsorted(rest.left, column * WIDTH - 0.5)
    count = np.zeros(rest.left.size)
    count[at] = bricks_of
    mass = (1 - table.rest) / BRICKS
    # Sixty-five places in each column, both edges among them.
    x = rest.left[:, None] + np.linspace(0, WIDTH, 65)
    density = stats.norm.pdf(x / RESOLUTION) / RESOLUTION

    assert table.column.size == BRICKS
    assert np.array_equal(np.diff(column), np.ones(column.size - 1))
    assert np.array_equal(column * WIDTH - 0.5, rest.left[at])
    assert np.array_equal(np.diff(rest.left), np.full(rest.left.size - 1, WIDTH))
    assert np.allclose(count * mass / WIDTH, rest.heights, rtol=1e-13, atol=0)
    assert (rest.heights[:, None] <= density * (1 + 1e-12)).all()
    assert ((rest.heights + rest.tallest)[:, None] >= density * (1 - 1e-12)).all()
    assert 0 < table.rest < 0.01


def test_proposals_are_made_from_boxes_and_tails_by_their_masses() -> None:
    table = bricks().uncovered
    entries = np.bincount(table.boxes, minlength=table.left.size)
    boxes = float((table.tallest * WIDTH).sum())
    edges = (table.left_edge, table.right_edge)
    # Under an exponential with the slope of the density's logarithm where the tail begins.
    left, right = (stats.norm.pdf(t / RESOLUTION) * RESOLUTION / abs(t) for t in edges)

    assert np.allclose(entries / table.tallest, (entries / table.tallest)[0], rtol=1e-12, atol=0)
    total = boxes + left + right
    assert table.boxes_to == pytest.approx(boxes / total, rel=1e-12)
    assert table.right_from == pytest.approx((boxes + left) / total, rel=1e-12)
    assert edges == (table.left[0], table.left[-1] + WIDTH)


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
    uncovered: NDArray[np.int32],
) -> None:
    drawn = uncovered[uncovered != NOTHING]
    table = bricks().uncovered
    edges = np.append(table.left, table.left[-1] + WIDTH) + 0.5

    left_over = normal_mass(edges)
    left_over[1:-1] -= table.heights * WIDTH

    assert (left_over > 0).all()
    assert left_over.sum() == pytest.approx(bricks().rest, rel=1e-9)
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
    rng: np.random.Generator,
) -> None:
    # Of the table's own tails a test would see nothing: one draw in two million is there. Here
    # they are all that is proposed, and every draw is uncovered.
    table = bricks().uncovered._replace(boxes_to=0.0, right_from=0.5, per_gap=0.0)
    steps = np.full(200_000, NOTHING, np.int32)
    words = rng.integers(0, 2**64, 4 * 200_000, dtype=np.uint64)
    made = put_beyond(words, table, steps, 0)
    drawn = steps[:made] / RESOLUTION

    assert np.all(steps[made:] == NOTHING)
    for tail, edge in ((drawn[drawn > 0], table.right_edge), (-drawn[drawn < 0], -table.left_edge)):
        start = edge / RESOLUTION
        share = stats.norm.sf(tail) / stats.norm.sf(start)
        assert stats.kstest(share, "uniform").pvalue > FALSE_ALARM
        # Rejection keeps what lies below the density, by Marsaglia's envelope.
        kept = stats.norm.sf(start) / (stats.norm.pdf(start) / start)
        assert stats.binomtest(tail.size, 100_000, kept).pvalue > FALSE_ALARM


def test_each_draw_is_in_no_brick_independently(uncovered: NDArray[np.int32]) -> None:
    places = np.flatnonzero(uncovered != NOTHING)
    between = np.diff(places)
    rest = bricks().rest

    longest = 600
    counts = np.bincount(np.minimum(between - 1, longest))
    chance = (1 - rest) ** np.arange(longest + 1)
    expected = np.append(chance[:-1] * rest, chance[-1])

    assert stats.chisquare(counts, between.size * expected).pvalue > FALSE_ALARM
    assert stats.binomtest(places.size, uncovered.size, rest).pvalue > FALSE_ALARM
    correlation = float(np.corrcoef(between[:-1], between[1:])[0, 1])
    assert abs(correlation) < stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(between.size)


def test_each_place_is_as_likely_as_the_next_to_be_in_no_brick(rng: np.random.Generator) -> None:
    # Calls of 50 draws: the count to the first one that is uncovered begins anew in each.
    table, places = bricks(), np.zeros(50)
    calls, out = 40_000, np.empty(50, np.int32)
    for _ in range(calls):
        out[:] = NOTHING
        put_beyond(rng.integers(0, 2**64, 400, dtype=np.uint64), table.uncovered, out, -1)
        places += out != NOTHING

    expected = calls * table.rest
    distance = float(np.sum((places - expected) ** 2)) / (expected * (1 - table.rest))
    assert stats.chi2.sf(distance, 50) > FALSE_ALARM


def by_numpy(words: NDArray[np.uint64], table: Uncovered, out: NDArray[np.int32]) -> int:
    """What `put` does after bricks, all proposals at a time; gives how many words it used."""
    across, up, further, gap = ((words.reshape(-1, 4) >> 11) + 0.5).T * 2.0**-53
    along = across * (table.boxes.size / table.boxes_to)
    entry = np.minimum(along.astype(np.int64), table.boxes.size - 1)
    column = table.boxes[entry]
    x = table.left[column] + (along - entry) * WIDTH
    bell = np.exp(-0.5 * (x / RESOLUTION) ** 2) / (RESOLUTION * math.sqrt(2 * math.pi))
    keep = table.heights[column] + up * table.tallest[column] < bell
    right = across >= table.right_from
    start = np.where(right, table.right_edge, -table.left_edge) / RESOLUTION
    excess = -np.log(further) / start
    tail = across >= table.boxes_to
    x = np.where(tail, np.where(right, 1, -1) * (start + excess) * RESOLUTION, x)
    keep = np.where(tail, up < np.exp(-0.5 * excess**2), keep)
    keep[0] = True  # before the first draw there is a gap alone
    kept = np.flatnonzero(keep)
    places = np.cumsum(1 + np.floor(np.log(gap[kept]) * table.per_gap)).astype(np.int64) - 1
    inside = places[:-1] < out.size
    out[places[:-1][inside]] = np.floor(x[kept[1:]] + 0.5)[inside]
    return int(4 * (kept[np.flatnonzero(places >= out.size)[0]] + 1))


def test_machine_code_draws_what_numpy_draws_from_the_same_words(
    rng: np.random.Generator,
) -> None:
    words = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    table = bricks()
    # Half of the proposals are tails, so that both of them are seen.
    often = table.uncovered._replace(boxes_to=0.5, right_from=0.75)
    halves = words.view(np.uint16)
    for kind in (table.uncovered, often):
        drawn = np.empty(words.size * 2, np.int32)
        from_bricks = table.column[halves[::2]] * np.int32(WIDTH) + halves[1::2]
        expected = from_bricks.copy()
        used = by_numpy(words, kind, expected)
        # However the words come, by fours.
        place = put(words.view(np.uint32), table.column, words[:4000], *kind, drawn, -1)
        end = put(words.view(np.uint32), table.column, words[4000:used], *kind, drawn, place)

        assert place < drawn.size <= end
        assert 0 < np.count_nonzero(drawn != from_bricks) < drawn.size / 50
        np.testing.assert_array_equal(drawn, expected)


@pytest.mark.parametrize("size", [1, 3, 1_000, 200_000])
def test_requests_of_any_size_come_from_one_distribution(
    rng: np.random.Generator, size: int
) -> None:
    requests = [np.empty(size, np.int32) for _ in range(400_000 // size // (8 if size < 9 else 1))]

    for request in requests:
        draw_normal(request, lambda words: fill(rng, words))

    drawn = np.concatenate(requests) / RESOLUTION
    assert stats.kstest(drawn, "norm").pvalue > FALSE_ALARM
    for bound in (2.5, 3.3437):
        share = 2 * stats.norm.sf(bound)
        outside = int(np.sum(np.abs(drawn) > bound))
        assert stats.binomtest(outside, drawn.size, share).pvalue > FALSE_ALARM


@pytest.mark.parametrize("size", [0, 1, 2, 3, 32_767, 32_768, 32_769])
def test_all_of_the_memory_is_filled(rng: np.random.Generator, size: int) -> None:
    drawn = np.full(size + 1, NOTHING, np.int32)

    draw_normal(drawn[:size], lambda words: fill(rng, words))

    assert (drawn[:size] != NOTHING).all()
    assert drawn[size] == NOTHING


def test_words_that_run_out_are_asked_for_again(rng: np.random.Generator) -> None:
    requests = []

    def unlucky(words: NDArray[np.uint64]) -> None:
        # At first, proposals at the upper end of a tail's envelope, all of which are refused.
        requests.append(words.size)
        fill(rng, words)
        if len(requests) < 4:
            words[:] = 2**64 - 1

    drawn = np.full(1000, NOTHING, np.int32)
    draw_normal(drawn, unlucky)

    assert len(requests) > 3
    assert max(requests[1:]) < requests[0]
    assert (drawn != NOTHING).all()


def test_nothing_of_a_draw_is_left_behind(rng: np.random.Generator) -> None:
    given = []

    def remember(words: NDArray[np.uint64]) -> None:
        given.append(words)
        fill(rng, words)

    draw_normal(np.empty(40_000, np.int32), remember)

    assert given
    assert not any(np.any(words) for words in given)
