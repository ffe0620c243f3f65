import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedward.privacy.mechanisms.normal import NormalDraws, beyond_strips, strips

FALSE_ALARM = 1e-9
DRAWS = 1_000_000
PARTS = 4096


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def words_of(rng: np.random.Generator) -> NormalDraws:
    return NormalDraws(lambda words: fill(rng, words))


def fill(rng: np.random.Generator, words: NDArray[np.uint64]) -> None:
    words[:] = rng.integers(0, 2**64, words.size, dtype=np.uint64)


def test_strips_have_one_mass_and_lie_below_the_curve() -> None:
    parts = strips()
    widths = np.diff(parts.edges)

    assert parts.strips == 2 * widths.size
    assert np.allclose(widths * parts.heights * PARTS, 1, rtol=1e-12, atol=0)
    assert np.all(parts.heights <= stats.norm.pdf(parts.edges[1:]) * (1 + 1e-11))
    assert np.allclose(parts.upper, stats.norm.pdf(parts.edges[:-1]), rtol=1e-13, atol=0)
    # The resolution that `add_noise` counts on: 2^52 places a strip, 1e10 within 2^-17.
    assert widths.max() < 2.0**52 * 2.0**-17 / 1e11


def test_each_strip_gets_what_the_normal_distribution_has_there(rng: np.random.Generator) -> None:
    drawn = np.empty(DRAWS)
    words_of(rng).fill(drawn, std=1.0)
    edges = strips().edges

    inside = np.histogram(np.abs(drawn), bins=edges)[0]
    counts = np.append(inside, np.sum(np.abs(drawn) > edges[-1]))

    expected = 2 * DRAWS * np.append(np.diff(stats.norm.cdf(edges)), stats.norm.sf(edges[-1]))
    assert stats.chisquare(counts, expected).pvalue > FALSE_ALARM


def test_wedges_and_tails_have_the_distribution_that_the_strips_leave(
    rng: np.random.Generator,
) -> None:
    drawn = np.concatenate([beyond_strips(lambda words: fill(rng, words)) for _ in range(150)])
    edges = strips().edges
    count = edges.size - 1

    def left_over(x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mass between 0 and x that is under the curve and in no strip, over all of it."""
        below = np.interp(x, edges, np.arange(count + 1) / PARTS)
        return np.asarray((stats.norm.cdf(x) - 0.5 - below) / (0.5 - count / PARTS))

    assert stats.kstest(np.abs(drawn), left_over).pvalue > FALSE_ALARM
    assert stats.binomtest(int(np.sum(drawn > 0)), drawn.size).pvalue > FALSE_ALARM
    far = np.abs(drawn) > 4
    share = stats.norm.sf(4.0) / (0.5 - count / PARTS)
    assert stats.binomtest(int(np.sum(far)), drawn.size, share).pvalue > FALSE_ALARM


def test_nothing_of_a_draw_is_left_behind(rng: np.random.Generator) -> None:
    normal = words_of(rng)
    drawn = np.empty(40_000)

    normal.fill(drawn, std=1.0)

    kept = [value for value in vars(normal).values() if isinstance(value, np.ndarray)]
    bases = [value if value.base is None else value.base for value in kept]
    assert len(bases) == 3
    for base in bases:
        assert not np.isin(drawn, np.asarray(base).real[np.asarray(base).real != 0]).any()
    assert not any(np.any(value) for value in kept[:2])
