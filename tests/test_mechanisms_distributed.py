import math

import numpy as np
import pytest

from fedward.privacy.accounting import calibrate, dp_sgd_event, privacy_spent
from fedward.privacy.mechanisms.discrete import DiscreteGaussian
from fedward.privacy.mechanisms.distributed import (
    DistributedGaussian,
    largest_rounded_norm,
    round_conditionally,
)
from fedward.privacy.mechanisms.encoding import FixedPoint
from fedward.privacy.mechanisms.stream import BitStream

DELTA = 1e-5


def mechanism(**changes: float) -> DistributedGaussian:
    wanted = {
        "noise_multiplier": 4.0,
        "clip_norm": 1.0,
        "length": 500,
        "sites": 10,
        "dropouts": 3,
        "colluders": 0,
        "largest_batch": 200,
    }
    return DistributedGaussian.calibrate(**{**wanted, **changes})  # type: ignore[arg-type]


def test_the_fewest_survivors_reach_the_wanted_noise() -> None:
    found = mechanism()

    assert found.honest == 7
    assert found.noise_multiplier >= 4.0
    assert found.share_std * math.sqrt(7) / 4.0 == pytest.approx(1, rel=1e-3)


def test_more_survivors_mean_more_noise_and_colluders_less() -> None:
    found = mechanism()

    assert found.against(survivors=10, colluders=0).noise_multiplier > 4.7
    assert found.against(survivors=7, colluders=6).noise_multiplier < 1.6
    assert mechanism(colluders=6).honest == 1


def test_epsilon_is_at_least_that_of_pooled_dp_sgd_and_hardly_more() -> None:
    wanted = calibrate(epsilon=1.0, delta=DELTA, sample_rate=0.1, steps=50)
    found = mechanism(noise_multiplier=wanted)
    pooled = privacy_spent(
        dp_sgd_event(noise_multiplier=wanted, sample_rate=0.1, steps=50),
        delta=DELTA,
        unit="patient",
    )

    spent = found.spent(sample_rate=0.1, steps=50, delta=DELTA, unit="patient")

    assert spent.delta == DELTA
    assert spent.epsilon == pytest.approx(pooled.epsilon, rel=2e-3)
    fewer = found.against(survivors=7, colluders=3)
    assert fewer.spent(sample_rate=0.1, steps=50, delta=DELTA, unit="patient").epsilon > 1.2


@pytest.mark.parametrize("sample_rate", [1.0, 0.25])
def test_the_reduction_to_a_gaussian_bounds_the_exact_loss_in_one_dimension(
    sample_rate: float,
) -> None:
    from dp_accounting.pld import privacy_loss_distribution as pld

    # One coordinate, one granule a unit: here the exact privacy loss distribution is known.
    shift, std = 6, 12.0
    exact = pld.from_discrete_gaussian_mechanism(
        std, sensitivity=shift, sampling_prob=sample_rate, value_discretization_interval=1e-4
    ).self_compose(5)
    continuous = pld.from_gaussian_mechanism(
        math.sqrt(std**2 - 2.5**2),
        sensitivity=shift,
        sampling_prob=sample_rate,
        value_discretization_interval=1e-4,
    ).self_compose(5)

    for epsilon in (0.1, 0.5, 1.0, 2.0):
        ours = continuous.get_delta_for_epsilon(epsilon)
        theirs = exact.get_delta_for_epsilon(epsilon)
        # The exact one is rounded up too, by 5 cells of 1e-4.
        assert ours >= exact.get_delta_for_epsilon(epsilon + 5e-4) * (1 - 1e-6)
        assert ours < theirs * 2 + 1e-9


def test_a_rounded_gaussian_is_a_discrete_gaussian() -> None:
    # The step of the proof: round y ~ N(x, std^2 - r^2) to a discrete Gaussian around y.
    std, r, x = 3.0, 1.2, 4
    grid = np.linspace(x - 40, x + 40, 40_001)
    density = np.exp(-((grid - x) ** 2) / (2 * (std**2 - r**2)))
    density /= density.sum()
    z = np.arange(x - 12, x + 13)
    kernel = np.exp(-((z[:, None] - grid) ** 2) / (2 * r**2))
    integers = np.arange(x - 60, x + 61)
    norm = np.array([np.exp(-((integers - y) ** 2) / (2 * r**2)).sum() for y in grid])
    made = (kernel / norm * density).sum(axis=1)
    wanted = np.exp(-((z - x) ** 2) / (2 * std**2))
    wanted /= np.exp(-(np.arange(-60, 61) ** 2) / (2 * std**2)).sum()

    from fedward.privacy.mechanisms.discrete import periodic_excess

    excess = periodic_excess(r)
    assert np.abs(np.log(made / wanted)).max() <= math.log1p(2 * excess / (1 - excess)) + 1e-9


@pytest.mark.parametrize("failure", [0.5, 0.01])
def test_a_rounded_vector_is_longer_than_the_bound_as_rarely_as_stated(failure: float) -> None:
    length, draws = 40, 4_000
    rng = np.random.default_rng(3)
    vector = rng.standard_normal(length)
    vector /= np.linalg.norm(vector)
    granularity = 0.2
    limit = largest_rounded_norm(
        clip_norm=1.0, granularity=granularity, length=length, failure=failure
    )
    fixed, bits = FixedPoint(granularity=granularity, bound=1.0), BitStream.secure()

    norms = np.array(
        [np.linalg.norm(fixed.decode(fixed.encode(vector, bits=bits))) for _ in range(draws)]
    )

    # Hoeffding at 1e-9.
    assert (norms > limit).mean() <= failure + math.sqrt(math.log(1e9) / (2 * draws))
    assert norms.max() <= 1 + granularity * math.sqrt(length)


def test_conditional_rounding_never_exceeds_its_bound() -> None:
    length, granularity = 30, 0.3
    vector = np.full(length, 1 / math.sqrt(length))
    limit = largest_rounded_norm(
        clip_norm=1.0, granularity=granularity, length=length, failure=math.exp(-0.5)
    )
    bits = BitStream.secure()

    for _ in range(200):
        rounded = round_conditionally(vector, clip_norm=1.0, granularity=granularity, bits=bits)
        assert np.linalg.norm(rounded * granularity) <= limit
    with pytest.raises(ValueError, match="longer than 1"):
        round_conditionally(2 * vector, clip_norm=1.0, granularity=granularity, bits=bits)


def test_with_the_same_bits_a_patient_changes_a_rounded_sum_by_its_own_rounding() -> None:
    # The coupling of the proof: each coordinate moves by the patient's value, rounded up or down.
    rng = np.random.default_rng(8)
    total, patient = rng.uniform(-3, 3, 2_000), rng.uniform(-1, 1, 2_000)
    fixed = FixedPoint(granularity=0.125, bound=8.0)

    without = fixed.encode(total, bits=BitStream.simulated(4)).view(np.int32)
    including = fixed.encode(total + patient, bits=BitStream.simulated(4)).view(np.int32)

    moved = (including - without).astype(np.float64)
    assert np.all(moved >= np.floor(patient / 0.125 - 1e-6))
    assert np.all(moved <= np.ceil(patient / 0.125 + 1e-6))
    assert abs((moved - patient / 0.125).mean()) < 0.1


def test_the_decoded_sum_of_all_sites_is_the_plain_sum_with_the_wanted_noise() -> None:
    length, sites = 60_000, 10
    found = mechanism(length=length, dropouts=0, noise_multiplier=2.0)
    rng = np.random.default_rng(1)
    vectors = [rng.uniform(-1, 1, length).astype(np.float32) for _ in range(sites)]

    total = np.zeros(length, np.uint32)
    for vector in vectors:
        total += found.privatise(vector, largest_batch=200, bits=BitStream.secure())

    noise = found.fixed_point(largest_batch=200).decode(total) - np.sum(
        vectors, axis=0, dtype=np.float64
    )
    variance = found.share_std**2 * sites
    # Chi-square, Laurent and Massart at 1e-9, both ways; then one share less is outside.
    slack = 2 * math.sqrt(math.log(1e9) / length) + 2 * math.log(1e9) / length
    ratio = float((noise**2).mean()) / variance
    assert abs(ratio - 1) < slack
    assert slack < 1 / sites
    assert math.sqrt(variance) >= 2.0


def test_a_vector_of_another_length_or_too_large_is_refused() -> None:
    found = mechanism()

    with pytest.raises(ValueError, match="shape"):
        found.privatise(np.zeros(499), largest_batch=200, bits=BitStream.secure())
    with pytest.raises(ValueError, match="clip first"):
        found.privatise(np.full(500, 201.0), largest_batch=200, bits=BitStream.secure())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colluders": 7}, "at least one honest"),
        ({"dropouts": -1}, "at least one honest"),
        ({"noise_multiplier": 0.0}, "positive"),
        ({"largest_batch": 10**9}, "too small"),
    ],
)
def test_what_cannot_be_guaranteed_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mechanism(**changes)


def test_so_little_noise_that_the_proof_fails_is_refused() -> None:
    with pytest.raises(ValueError, match="granules"):
        DistributedGaussian(clip_norm=1, share_std=1.0, granularity=1.0, length=5, honest=3)
    with pytest.raises(ValueError, match="alone fails"):
        mechanism().remaining_delta(delta=1e-30, epsilon=1.0, steps=10)


def test_a_share_is_sampled_at_the_stated_width() -> None:
    found = mechanism()

    assert isinstance(found.sampler, DiscreteGaussian)
    assert found.sampler.std * found.granularity == pytest.approx(found.share_std)
