from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from fedward.privacy.accounting import gaussian_event
from fedward.privacy.mechanisms import (
    NoiseSource,
    add_noise,
    release_count,
    secure_source,
    seeding,
    simulated_source,
)
from fedward.privacy.mechanisms.noise import drawing, noise_step, steps_per_unit
from fedward.privacy.mechanisms.normal import BLOCK, RESOLUTION
from fedward.privacy.mechanisms.sources import SecureSource, SimulatedSource, simulated_sources

FALSE_ALARM = 1e-9
DRAWS = 1_000_000

SOURCES = [secure_source(), simulated_source(7, "noise")]
NAMES = ["secure", "simulated"]
every_source = pytest.mark.parametrize("source", SOURCES, ids=NAMES)


@pytest.fixture(scope="module", params=SOURCES, ids=NAMES)
def draws(request: pytest.FixtureRequest) -> NDArray[np.float64]:
    source: NoiseSource = request.param
    return np.asarray(source.gaussian(DRAWS, std=1.0), dtype=np.float64)


def test_draws_are_normal_by_kolmogorov_and_smirnov(draws: NDArray[np.float64]) -> None:
    assert stats.kstest(draws, special.ndtr).pvalue > FALSE_ALARM


def test_draws_are_normal_by_chi_square_over_equally_likely_bins(
    draws: NDArray[np.float64],
) -> None:
    bins = 1000

    counts = np.bincount((special.ndtr(draws) * bins).astype(int), minlength=bins)

    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_tails_are_as_heavy_as_they_should_be(draws: NDArray[np.float64]) -> None:
    for bound in (2.0, 3.0, 4.0, 4.5):
        for beyond in (np.sum(draws > bound), np.sum(draws < -bound)):
            expected = stats.norm.sf(bound)
            assert stats.binomtest(int(beyond), DRAWS, expected).pvalue > FALSE_ALARM


def test_moments_are_those_of_the_normal(draws: NDArray[np.float64]) -> None:
    z = stats.norm.isf(FALSE_ALARM / 2)

    # Standard errors of the first four moments of n normal draws.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        deviation = float(np.mean(draws**power)) - mean
        assert abs(deviation) < z * math.sqrt(variance / DRAWS)


def test_draws_of_one_call_do_not_depend_on_each_other(draws: NDArray[np.float64]) -> None:
    z = stats.norm.isf(FALSE_ALARM / 2)

    # Lag 1 and 2, and a block of 32,768 and half of one; squares too.
    for lag in (1, 2, 1 << 14, 1 << 15):
        for a, b in ((draws[:-lag], draws[lag:]), (draws[:-lag] ** 2 - 1, draws[lag:] ** 2 - 1)):
            correlation = float(np.mean(a * b)) / math.sqrt(float(np.mean(a**2) * np.mean(b**2)))
            assert abs(correlation) < z / math.sqrt(len(a))


@every_source
def test_uniform_draws_are_uniform_and_below_one(source: NoiseSource) -> None:
    drawn = source.uniform(DRAWS)

    counts = np.bincount((drawn * 1000).astype(int), minlength=1000)
    assert 0 <= drawn.min() <= drawn.max() < 1
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_two_secure_sources_are_independent() -> None:
    one, two = (secure_source().gaussian(DRAWS, std=1.0) for _ in range(2))

    correlation = float(np.mean(one * two))

    assert abs(correlation) < stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(DRAWS)
    # Of a million pairs of whole numbers near 10^7, .05 are to be expected equal.
    assert np.count_nonzero(one == two) < 10


@every_source
@pytest.mark.parametrize("std", [1e-6, 0.37, 1.0, 12.5])
def test_noise_has_the_standard_deviation_that_was_asked_for(
    source: NoiseSource, std: float
) -> None:
    noise = add_noise(np.zeros(200_000, dtype=np.float32), std=std, sensitivity=std, source=source)

    # n s^2 / std^2 has a chi-square distribution; a deficit of 2% would have p < 1e-30.
    ratio = float(np.sum(np.square(noise.astype(np.float64)))) / std**2
    assert stats.chi2.sf(ratio, noise.size) > FALSE_ALARM
    assert stats.chi2.cdf(ratio, noise.size) > FALSE_ALARM


def are_multiples(released: NDArray[np.float32], step: float) -> bool:
    """Whether all are whole numbers in single precision times the step in single precision."""
    unit = np.float32(step)
    near = np.rint(released.astype(np.float64) / float(unit)).astype(np.float32)
    # Beyond 2^23 steps the quotient is off by more than a half.
    found = np.zeros(released.shape, bool)
    for whole in (near, np.nextafter(near, np.inf), np.nextafter(near, -np.inf)):
        found |= (whole == np.rint(whole)) & (whole.astype(np.float32) * unit == released)
    return bool(found.all())


def in_precision(
    vector: NDArray[np.float64], *, double: bool
) -> NDArray[np.float32] | NDArray[np.float64]:
    return vector if double else vector.astype(np.float32)


@settings(max_examples=100)
@given(
    std=st.floats(1e-8, 1e8),
    multiplier=st.floats(0.01, 100),
    secret=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    double=st.booleans(),
)
def test_released_values_are_multiples_of_a_step_that_the_secret_does_not_move(
    std: float, multiplier: float, secret: list[float], double: bool
) -> None:
    vector = in_precision(np.array(secret) * std, double=double)
    sensitivity = std / multiplier

    released = add_noise(vector, std=std, sensitivity=sensitivity, source=SOURCES[0])

    assert are_multiples(released, noise_step(std, sensitivity=sensitivity, size=vector.size))


@settings(max_examples=200)
@given(
    std=st.floats(1e-6, 1e6),
    multiplier=st.floats(0.05, 200),
    size=st.sampled_from([1, 10, 1_000, 100_000, 10_000_000]),
)
def test_noise_covers_what_rounding_adds_to_the_sensitivity(
    std: float, multiplier: float, size: int
) -> None:
    sensitivity = std / multiplier
    step = noise_step(std, sensitivity=sensitivity, size=size)

    # In steps, as released: neighbours, scaled in single precision and rounded; and the noise.
    apart = sensitivity * steps_per_unit(step) + 2 * math.sqrt(size)

    assert RESOLUTION / apart >= multiplier * (1 - 1e-12)
    assert RESOLUTION * step < std * (1 + 4 * multiplier * math.sqrt(size) / RESOLUTION + 1e-6)


@settings(max_examples=200)
@given(
    secret=st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=20),
    scale=st.floats(1e-3, 2.0**20),
    double=st.booleans(),
)
def test_rounding_moves_an_element_by_less_than_a_step(
    secret: list[float], scale: float, double: bool
) -> None:
    vector = in_precision(np.array(secret) * scale, double=double)
    step = noise_step(1.0, sensitivity=1.0, size=vector.size)
    silent = Silent()

    released = add_noise(vector, std=1.0, sensitivity=1.0, source=silent).astype(np.float64)

    # One step, and what single precision takes off the result afterwards.
    unit = float(np.float32(step))
    moved = np.abs(released / unit - vector.astype(np.float64) * steps_per_unit(step))
    assert (moved <= 1 + np.abs(released / unit) * 2.0**-23).all()


class Silent:
    """Adds nothing, so that what is done to the vector shows."""

    private = False

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:
        return np.zeros(size) * std

    def uniform(self, size: int) -> NDArray[np.float64]:
        return np.zeros(size)


def test_how_large_the_rest_of_a_vector_is_does_not_show_in_an_element() -> None:
    # A large element has the whole part computed in doubles; the others are released alike.
    noise = np.random.default_rng(5).normal(size=5_000)

    class Fixed(Silent):
        def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:
            return noise[:size] * std

    small = np.linspace(-2.0, 2.0, 5_000, dtype=np.float32)
    large = small.copy()
    large[-1] = 1e6

    one, other = (
        add_noise(vector, std=1.0, sensitivity=1.0, source=Fixed()) for vector in (small, large)
    )

    # Both are within a step of what they stand for, and look alike.
    step = noise_step(1.0, sensitivity=1.0, size=small.size)
    apart = (one[:-1].astype(np.float64) - other[:-1].astype(np.float64)) / step
    assert np.abs(apart).max() <= 2 + 2.0**26 * 2.0**-24
    assert are_multiples(one, step)
    assert are_multiples(other, step)


def low_bits(released: NDArray[np.float64]) -> float:
    """Mironov's attack: the share of values near 0 that are multiples of 2**-53.

    Noise near -1 has no finer bits than that, and noise near 0 has: so of a sum near 0 the low
    bits say whether the secret was 1 or 0.
    """
    near = released[np.abs(released) < 1 / 16]
    return float(np.mean(np.rint(near * 2.0**53) == near * 2.0**53))


def test_low_bits_betray_the_secret_of_a_plain_sum() -> None:
    noise = np.random.default_rng(3).standard_normal(DRAWS)

    assert low_bits(noise + 1.0) == 1.0
    assert low_bits(noise + 0.0) < 0.5


def test_low_bits_of_what_is_released_say_nothing() -> None:
    step = noise_step(1.0, sensitivity=1.0, size=DRAWS)
    for secret in (0.0, 1.0, 1 / 3):
        released = add_noise(np.full(DRAWS, secret), std=1.0, sensitivity=1.0, source=SOURCES[0])

        assert are_multiples(released, step)
        # Near 0 every whole number of steps is as likely as the next, whatever the secret.
        near = np.rint(released[np.abs(released) < 1 / 16] / float(np.float32(step))).astype(int)
        assert stats.chisquare(np.bincount(near & 255, minlength=256)).pvalue > FALSE_ALARM


def test_neighbours_do_not_betray_the_secret() -> None:
    # Holohan and Braghin 2021: of a pair of Box-Muller draws x^2 + y^2 gives, for the right
    # secret alone, a uniform -log u that is a multiple of 2^-63 or so. There are no pairs here,
    # and in whole steps both guesses look alike.
    released = add_noise(
        np.full(1 << 16, 0.25), std=1.0, sensitivity=1.0, source=SOURCES[0]
    ).astype(np.float64)

    for distance in (1, 1 << 14, 1 << 15):
        residues = []
        for guess in (0.25, 0.25 + 2.0**-20):
            noise = released - guess
            pairs = noise[:-distance] ** 2 + noise[distance:] ** 2
            residues.append(np.exp(-0.5 * pairs) * 2.0**32 % 1.0)

        assert stats.ks_2samp(*residues).pvalue > FALSE_ALARM


@every_source
@pytest.mark.parametrize("size", [100, 300_000])
def test_noise_may_take_the_place_of_what_it_hides(source: NoiseSource, size: int) -> None:
    vector = np.full((size, 1), 3.0, dtype=np.float32)

    released = add_noise(vector, std=0.5, sensitivity=1.0, source=source, out=vector)

    assert np.shares_memory(released, vector)
    assert released.shape == vector.shape
    ratio = float(np.sum((vector.astype(np.float64) - 3.0) ** 2)) / 0.25
    assert min(stats.chi2.sf(ratio, size), stats.chi2.cdf(ratio, size)) > FALSE_ALARM
    for wrong in (np.empty(size - 1, np.float32), np.empty((size, 2), np.float32)[:, :1]):
        with pytest.raises(ValueError, match="contiguous and of the vector's shape"):
            add_noise(vector, std=0.5, sensitivity=1.0, source=source, out=wrong)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64])
def test_a_vector_may_be_of_any_kind_and_closed_to_writing(kind: type[np.generic]) -> None:
    vector = np.arange(12).astype(kind)[::2].reshape(2, 3).T
    vector.flags.writeable = False

    released = add_noise(vector, std=1.0, sensitivity=1.0, source=Silent())

    assert released.dtype == np.float32
    np.testing.assert_allclose(released, np.arange(0, 12, 2).reshape(2, 3).T, atol=1e-6)
    np.testing.assert_array_equal(vector, np.arange(0, 12, 2).reshape(2, 3).T)


def plain_sum(
    vector: NDArray[np.float32] | NDArray[np.float64], drawn: NDArray[np.int32], step: float
) -> NDArray[np.float32]:
    """What `add_noise` promises, by fractions: 24 bits rounded, and what is left rounded."""
    scale = Fraction(steps_per_unit(step))
    released = []
    for value, noise in zip(vector.tolist(), drawn.tolist(), strict=True):
        upper = float(np.float32(value))
        whole = round(Fraction(upper) * scale) + round(Fraction(value - upper) * scale) + noise
        released.append(np.float32(float(whole)) * np.float32(step))
    return np.array(released, np.float32)


@settings(max_examples=100)
@given(
    secret=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20),
    std=st.floats(1e-3, 1e3),
    double=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_what_is_released_is_the_rounded_sum_by_fractions(
    secret: list[float], std: float, double: bool, seed: int
) -> None:
    vector = in_precision(np.array(secret), double=double)
    drawn = np.empty(vector.size, np.int32)
    with drawing(simulated_source(seed), drawn.size) as draw:
        draw(drawn)

    released = add_noise(vector, std=std, sensitivity=std, source=simulated_source(seed))

    step = noise_step(std, sensitivity=std, size=vector.size)
    np.testing.assert_array_equal(released, plain_sum(vector, drawn, step))


@pytest.mark.parametrize("double", [False, True])
def test_long_vectors_are_released_part_by_part_in_the_order_of_the_draws(double: bool) -> None:
    size = 2 * BLOCK + 77
    vector = in_precision(np.linspace(-50, 50, size), double=double)
    drawn = np.empty(size, np.int32)
    with drawing(simulated_source(5), size) as draw:
        draw(drawn)

    released = add_noise(vector, std=2.0, sensitivity=1.0, source=simulated_source(5))

    step = noise_step(2.0, sensitivity=1.0, size=size)
    upper = vector.astype(np.float32).astype(np.float64)
    whole = np.rint(upper * steps_per_unit(step)) + np.rint((vector - upper) * steps_per_unit(step))
    expected = (whole + drawn).astype(np.float32) * np.float32(step)
    np.testing.assert_array_equal(released, expected)


def test_add_noise_refuses_what_noise_cannot_hide() -> None:
    source = SOURCES[0]
    for bad in (math.nan, math.inf, -math.inf):
        for vector in (np.array([0.0, bad]), np.array([bad, 0.0], np.float32)):
            with pytest.raises(ValueError, match="not finite"):
                add_noise(vector, std=1.0, sensitivity=1.0, source=source)
    with pytest.raises(ValueError, match="not finite"):
        add_noise(np.array([1e300]), std=1.0, sensitivity=1.0, source=source)
    for std in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="std must be positive"):
            add_noise(np.zeros(3), std=std, sensitivity=1.0, source=source)
        with pytest.raises(ValueError, match="sensitivity must be positive"):
            add_noise(np.zeros(3), std=1.0, sensitivity=std, source=source)
        with pytest.raises(ValueError, match="std must be positive"):
            source.gaussian(3, std=std)


@every_source
@pytest.mark.parametrize("size", [0, 1, 2, 3, 32_767, 32_768, 32_769, 100_001])
def test_every_size_is_filled(source: NoiseSource, size: int) -> None:
    drawn = source.gaussian(size, std=1.0)

    assert drawn.shape == source.uniform(size).shape == (size,)
    # Doubles of a simulation, and multiples of a six-millionth, of which .2% come twice.
    assert len(np.unique(drawn)) >= 0.99 * size
    assert add_noise(np.zeros((size, 2)), std=1.0, sensitivity=1.0, source=source).shape == (
        size,
        2,
    )


def test_a_simulated_source_repeats_in_every_process() -> None:
    program = (
        "import json; from fedward.privacy.mechanisms import simulated_source as s;"
        "d = s(7, 'cleveland', 3); print(json.dumps([*d.gaussian(5, std=2.0), *d.uniform(2)]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    source = simulated_source(7, "cleveland", 3)

    expected = [*source.gaussian(5, std=2.0), *source.uniform(2)]

    assert json.loads(run.stdout) == expected


def test_every_part_of_a_seed_counts() -> None:
    seeds: list[tuple[int | str, ...]] = [(7,), ("7",), (7, "a"), (7, "b"), ("7a",), (7, "a", 1)]

    first = {float(simulated_source(*seed).gaussian(1, std=1.0)[0]) for seed in seeds}

    assert len(first) == len(seeds)
    with pytest.raises(ValueError, match="needs a seed"):
        simulated_source()


def test_only_the_cryptographic_source_is_private() -> None:
    assert secure_source().private is True
    assert simulated_source(1).private is False
    assert isinstance(secure_source(), SecureSource)
    assert isinstance(simulated_source(1), SimulatedSource)


def test_a_forked_child_does_not_repeat_its_parent() -> None:
    source = secure_source()
    source.gaussian(10, std=1.0)
    receive, send = os.pipe()

    child = os.fork()
    if child == 0:
        os.write(send, source.uniform(8).tobytes())
        os._exit(0)
    os.close(send)
    drawn_by_child = np.frombuffer(os.read(receive, 64))
    os.waitpid(child, 0)
    os.close(receive)

    drawn_by_parent = source.uniform(8)
    assert not set(drawn_by_child) & set(drawn_by_parent)
    assert len(drawn_by_child) == 8


def test_threads_share_a_source_without_sharing_a_draw() -> None:
    source = secure_source()
    drawn: list[NDArray[np.float64]] = []

    def draw() -> None:
        drawn.extend(source.uniform(50) for _ in range(200))

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(np.unique(np.concatenate(drawn))) == 4 * 200 * 50


def test_a_refused_request_ends_the_key_and_frees_the_source() -> None:
    source = SecureSource()
    before = source._stream

    with pytest.raises(ValueError, match="not finite"):
        add_noise(np.array([math.nan]), std=1.0, sensitivity=1.0, source=source)

    assert source._stream is not before
    assert source.uniform(1).shape == (1,)


def test_a_source_shows_no_key() -> None:
    assert repr(secure_source()) == "SecureSource()"


def test_a_count_is_released_with_the_noise_that_its_event_names() -> None:
    source = secure_source()

    released = [release_count(300, noise_multiplier=5.0, source=source) for _ in range(4000)]

    counts = np.array([count for count, _ in released], dtype=np.float64)
    assert all(event == gaussian_event(5.0) for _, event in released)
    z = stats.norm.isf(FALSE_ALARM / 2)
    assert abs(counts.mean() - 300) < z * 5.0 / math.sqrt(4000)
    # Rounding to whole numbers adds 1/12 to the variance.
    ratio = float(np.sum((counts - 300) ** 2)) / (25 + 1 / 12)
    assert min(stats.chi2.sf(ratio, 4000), stats.chi2.cdf(ratio, 4000)) > FALSE_ALARM
    assert release_count(0, noise_multiplier=1e-9, source=source)[0] == 0
    with pytest.raises(ValueError, match="not negative"):
        release_count(-1, noise_multiplier=1.0, source=source)


def test_sources_made_together_or_started_anew_draw_what_each_alone_would() -> None:
    seeds = [(7, f"site-{number}", "train", 3) for number in range(40)]
    spent = simulated_sources([(1, number) for number in range(25)])
    for source in spent:
        source.gaussian(3, std=1.0)  # what it leaves half-used must not show

    together = simulated_sources(seeds, spent=spent)

    assert len({id(source) for source in together}) == 40
    for source, seed in zip(together, seeds, strict=True):
        alone = simulated_source(*seed)
        np.testing.assert_array_equal(source.uniform(7), alone.uniform(7))
        np.testing.assert_array_equal(source.gaussian(5, std=1.0), alone.gaussian(5, std=1.0))
    with pytest.raises(ValueError, match="needs a seed"):
        simulated_sources([(1,), ()])
    assert simulated_sources([]) == []


def test_keys_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [0, 1, 2**31, 2**224 - 1, 2**224, 2**256 - 1, *(3**n for n in range(1, 161, 3))]
    digests = iter([number.to_bytes(32) for number in numbers])
    monkeypatch.setattr(seeding, "_digest", lambda _: next(digests))

    keys = seeding.philox_keys([(number,) for number in range(len(numbers))])

    expected = [np.random.SeedSequence(n).generate_state(2, np.uint64) for n in numbers]
    np.testing.assert_array_equal(keys, expected)


def test_sources_that_live_at_the_same_time_do_not_share_a_generator() -> None:
    first, second = simulated_source(1), simulated_source(2)
    expected = simulated_source(1).uniform(6)

    drawn = [first.uniform(2), second.uniform(2), first.uniform(2), second.uniform(2)]

    np.testing.assert_array_equal(np.concatenate([drawn[0], drawn[2]]), expected[:4])
