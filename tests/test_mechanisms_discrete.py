import math
from fractions import Fraction

import numpy as np
import pytest

from fedward.privacy.mechanisms import discrete
from fedward.privacy.mechanisms.discrete import (
    DiscreteGaussian,
    exact_discrete_gaussian,
    log_ratio_of_sum,
    periodic_excess,
)
from fedward.privacy.mechanisms.stream import BitStream

FALSE_ALARM = 1e-9


def probabilities(std: float, reach: int) -> np.ndarray:
    """The discrete Gaussian on -reach..reach, from its definition."""
    weights: np.ndarray = np.exp(
        -(np.arange(-reach, reach + 1, dtype=np.float64) ** 2) / (2 * std**2)
    )
    found: np.ndarray = weights / weights.sum()
    return found


def fits(samples: np.ndarray, std: float) -> bool:
    """Chi-square against the discrete Gaussian, in some 60 cells of 20 or more expected."""
    reach = math.ceil(12 * std)
    expected = len(samples) * probabilities(std, reach)
    counts = np.bincount(np.clip(samples, -reach, reach) + reach, minlength=2 * reach + 1)
    cells = np.searchsorted(np.cumsum(expected) / len(samples), np.linspace(0, 1, 61)[1:-1])
    cells = np.unique(np.concatenate([[0], cells]))
    theirs, ours = np.add.reduceat(counts, cells), np.add.reduceat(expected, cells)
    keep = ours > 20
    statistic = float(((theirs[keep] - ours[keep]) ** 2 / ours[keep]).sum())
    free, x = int(keep.sum()), math.log(1 / FALSE_ALARM)
    # Laurent and Massart 2000, lemma 1: a chi-square of k degrees exceeds this with e^-x.
    return statistic < free + 2 * math.sqrt(free * x) + 2 * x


@pytest.mark.parametrize("std", [1.0, 3.3, 64.0, 512.0, 600.0, 5000.0, 100_000.0])
def test_samples_fit_the_discrete_gaussian(std: float) -> None:
    samples = DiscreteGaussian(std).sample(300_000, bits=BitStream.secure())

    assert fits(samples, std)
    assert not fits(samples, std * 1.03)
    assert not fits(samples + math.ceil(std / 30), std)


def test_the_exact_sampler_is_the_oracle_of_the_table() -> None:
    variance = Fraction(109, 10)

    exact = np.array([exact_discrete_gaussian(variance) for _ in range(8_000)])

    assert fits(exact, math.sqrt(10.9))
    assert not fits(exact, math.sqrt(10.9) * 1.2)


def test_the_table_holds_the_distribution_function_to_128_bits() -> None:
    table = discrete._table(2.0)

    # Fractions and Taylor's series: no arithmetic in common with the table's.
    def power(k: int) -> Fraction:
        exponent, term, total = Fraction(-k * k, 8), Fraction(1), Fraction(1)
        for n in range(1, 400):
            term = term * exponent / n
            total += term
            if abs(term) < Fraction(1, 2**260):
                break
        return total

    weights = [power(k) for k in range(-8, 9)]
    # Beyond 8 the rest is small and symmetric; take it from the table's own reach.
    tail = sum((power(k) for k in range(9, table.reach + 1)), Fraction(0))
    whole, running = sum(weights, Fraction(0)) + 2 * tail, tail
    for k, weight in zip(range(-8, 9), weights, strict=True):
        running += weight
        at = k + table.reach
        held = (int(table.high[at]) << 64) + int(table.low[at])
        assert abs(running / whole - Fraction(held, 2**128)) < Fraction(1, 2**127)


class Words(BitStream):
    """A stream whose words are given."""

    def __init__(self, *words: list[int]) -> None:
        super().__init__(bytes(32), private=False)
        self._given = [np.array(word, np.uint64) for word in words]

    def words64(self, size: int) -> np.ndarray:
        given = self._given.pop(0)
        assert len(given) == size
        return given


def test_a_word_on_a_threshold_is_decided_by_the_next_word() -> None:
    table = discrete._table(2.0)
    at = table.reach  # the threshold of z <= 0
    high, low = int(table.high[at]), int(table.low[at])

    drawn = [int(discrete._draw(table, 1, Words([high], [low + step]))[0]) for step in (-1, 0, 1)]
    beside = discrete._draw(table, 2, Words([high - 1, high + 1]))

    assert drawn == [0, 1, 1]
    assert list(beside) == [0, 1]


def test_the_extreme_words_give_the_ends_of_the_table() -> None:
    table = discrete._table(1.0)

    ends = discrete._draw(table, 1, Words([2**64 - 1], [2**64 - 1]))
    start = discrete._draw(table, 1, Words([0], [0]))

    assert ends[0] == table.reach
    assert start[0] <= -9  # whatever lies below has probability under 2^-64


@pytest.mark.parametrize("std", [1.0, 1.3, 2.0])
def test_sums_of_a_gaussian_over_the_integers_stay_within_the_stated_excess(std: float) -> None:
    k = np.arange(-60, 61)
    sums = [np.exp(-((k - y) ** 2) / (2 * std**2)).sum() for y in np.linspace(0, 1, 41)]

    worst = max(abs(s / (math.sqrt(2 * math.pi) * std) - 1) for s in sums)

    assert worst <= periodic_excess(std) + 1e-14
    assert worst >= periodic_excess(std) * 0.99 - 1e-14


@pytest.mark.parametrize("stds", [[1.5, 1.5], [1.5, 1.5, 1.5, 1.5], [1.6, 2.5]])
def test_a_sum_of_discrete_gaussians_is_as_near_to_one_as_stated(stds: list[float]) -> None:
    total = np.ones(1)
    for std in stds:
        total = np.convolve(total, probabilities(std, 40))
    reach = len(total) // 2
    one = probabilities(math.sqrt(sum(std**2 for std in stds)), reach)

    middle = slice(reach - 8, reach + 9)
    worst = float(np.abs(np.log(total[middle] / one[middle])).max())

    assert worst <= log_ratio_of_sum(stds) + 1e-13
    # Of two the bound is nearly met; of more it adds up what partly cancels.
    assert len(stds) > 2 or worst >= log_ratio_of_sum(stds) / 20 - 1e-13


def test_what_the_table_adds_to_delta_is_far_below_any_delta() -> None:
    for std in (1.0, 500.0, 2.0**20):
        sampler = DiscreteGaussian(std)
        # 10^7 coordinates, 64 sites, 10^4 rounds.
        assert sampler.total_variation * 10**7 * 64 * 10**4 < 1e-20
        assert sampler.log_ratio * 10**7 * 64 * 10**4 < 1e-20


def test_a_simulated_stream_gives_the_same_noise_twice() -> None:
    sampler = DiscreteGaussian(700.0)

    first = sampler.sample(100_000, bits=BitStream.simulated(1))

    assert np.array_equal(first, sampler.sample(100_000, bits=BitStream.simulated(1)))
    assert not np.array_equal(first, sampler.sample(100_000, bits=BitStream.simulated(2)))


def test_what_cannot_be_sampled_is_refused() -> None:
    for std in (0.9, 2.0**21, math.nan):
        with pytest.raises(ValueError, match="std must be"):
            DiscreteGaussian(std)
    with pytest.raises(ValueError, match="positive"):
        exact_discrete_gaussian(Fraction(0))
    with pytest.raises(ValueError, match="1 or more"):
        periodic_excess(0.5)


@pytest.mark.parametrize("share", [3.0, 700.0])
def test_the_sum_of_all_shares_fits_and_without_one_share_it_does_not(share: float) -> None:
    sites, draws = 10, 100_000
    sampler = DiscreteGaussian(share)
    shares = [sampler.sample(draws, bits=BitStream.secure()) for _ in range(sites)]
    wanted = share * math.sqrt(sites)

    assert fits(np.sum(shares, axis=0), wanted)
    assert not fits(np.sum(shares[1:], axis=0), wanted)
