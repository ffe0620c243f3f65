import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedward.privacy.mechanisms.encoding import FixedPoint
from fedward.privacy.mechanisms.stream import BitStream


@given(
    vectors=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 64), st.integers(1, 20)),
        elements=st.floats(-2, 2, width=32),
    )
)
def test_the_sum_equals_the_plain_sum_to_within_the_stated_bound(vectors: np.ndarray) -> None:
    sites, length = vectors.shape
    fixed = FixedPoint.choose(bound=2.0, sites=sites, length=length)
    bits = BitStream.secure()

    total = np.zeros(length, np.uint32)
    for vector in vectors:
        total += fixed.encode(vector, bits=bits)

    plain = vectors.astype(np.float64).sum(axis=0)
    assert np.all(np.abs(fixed.decode(total) - plain) <= fixed.rounding_error(sites))


def test_the_largest_vectors_of_all_sites_do_not_overflow() -> None:
    fixed = FixedPoint.choose(bound=1.0, sites=64, length=3)
    bits = BitStream.secure()

    for sign in (-1, 1):
        extreme = np.full(3, sign, np.float32)
        total = np.zeros(3, np.uint32)
        for _ in range(64):
            total += fixed.encode(extreme, bits=bits)
        assert np.allclose(fixed.decode(total), 64 * sign)


def test_rounding_has_no_bias() -> None:
    fixed = FixedPoint(granularity=1.0, bound=2.0)
    draws = 200_000

    values = fixed.decode(fixed.encode(np.full(draws, -0.3), bits=BitStream.secure()))

    assert set(np.unique(values)) == {-1.0, 0.0}
    # Hoeffding: the mean of `draws` bits is further off with probability below 1e-9.
    assert abs(values.mean() + 0.3) < math.sqrt(math.log(2 / 1e-9) / (2 * draws))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.01, -1.01])
def test_a_value_beyond_the_bound_is_refused(value: float) -> None:
    fixed = FixedPoint.choose(bound=1.0, sites=3, length=2)

    with pytest.raises(ValueError, match="clip first"):
        fixed.encode(np.array([0.0, value]), bits=BitStream.secure())


def test_noise_leaves_the_stated_room_before_a_sum_overflows() -> None:
    fixed = FixedPoint.choose(bound=1.0, sites=10, length=10**7, noise_std=3.0)

    assert fixed.overflow_log2(sites=10, length=10**7, noise_std=3.0) <= -40 + 1e-6
    assert fixed.overflow_log2(sites=10, length=10**7, noise_std=4.0) > -40
    # The tail of a normal distribution, which the bound must not fall below.
    room = (2**31 * fixed.granularity - 10) / 3.0
    assert fixed.overflow_log2(sites=10, length=10**7, noise_std=3.0) >= math.log2(
        2 * 10**7 * 0.5 * math.erfc(room / math.sqrt(2))
    )


def test_a_simulated_stream_repeats_and_says_that_it_is_not_private() -> None:
    first, second = BitStream.simulated(7, "a"), BitStream.simulated(7, "a")
    other = BitStream.simulated("7", "a")

    words = first.words32(1000)

    assert np.array_equal(words, second.words32(1000))
    assert not np.array_equal(words, other.words32(1000))
    assert not first.private
    assert BitStream.secure().private
