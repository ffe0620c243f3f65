"""Many simulated sources at once, against NumPy and against each source alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward.privacy.mechanisms import secure_source
from fedward.privacy.mechanisms.normal import BLOCK
from fedward.privacy.mechanisms.rows import add_noise_to_rows, draw_uniform_rows
from fedward.privacy.mechanisms.sources import SimulatedSource, simulated_sources
from fedward.privacy.mechanisms.streams import fill, upper_half

WORDS = st.integers(0, 2**64 - 1)


def sources(number: int) -> list[SimulatedSource]:
    return simulated_sources([(3, f"site-{place}") for place in range(number)])


@given(left=WORDS, right=WORDS)
def test_the_upper_half_of_a_product_is_that_of_whole_numbers(left: int, right: int) -> None:
    assert int(upper_half(np.uint64(left), np.uint64(right))) == (left * right) >> 64


@settings(deadline=None)
@given(key=st.tuples(WORDS, WORDS), used=st.integers(0, 2**40), size=st.integers(0, 50))
def test_words_are_those_of_numpy_wherever_the_stream_stands(
    key: tuple[int, int], used: int, size: int
) -> None:
    generator = np.random.Philox(key=np.array(key, np.uint64))
    generator.advance(used // 4)
    generator.random_raw(used % 4, output=False)
    words = np.full(size + 7, 5, np.uint64)

    fill(np.uint64(key[0]), np.uint64(key[1]), used, words, 4, 4 + size)

    np.testing.assert_array_equal(words[4 : 4 + size], generator.random_raw(size))
    assert set(words[:4].tolist()) | set(words[4 + size :].tolist()) == {5}


@pytest.mark.parametrize("size", [1, 62, 2114, BLOCK, BLOCK + 3])
def test_rows_draw_what_each_source_would_alone_and_go_on_from_there(size: int) -> None:
    together, alone = sources(5), sources(5)
    counts = np.array([7, 0, 28, 1, 5])
    rows = np.zeros((5, size), np.float32)

    for with_noise in (True, False, True):
        drawn = draw_uniform_rows(together, counts, with_noise=with_noise)
        released = add_noise_to_rows(
            rows, stds=[2.0] * 5, sensitivities=[1.0] * 5, sources=together
        )

        for place, source in enumerate(alone):
            expected = source.uniform(int(counts[place]))
            np.testing.assert_array_equal(drawn[place, : counts[place]], expected)
            assert (drawn[place, counts[place] :] == 1).all()
            by_itself = add_noise_to_rows(
                rows[:1], stds=[2.0], sensitivities=[1.0], sources=[source]
            )
            np.testing.assert_array_equal(released[place], by_itself[0])
    np.testing.assert_array_equal(together[2].uniform(9), alone[2].uniform(9))
    assert [source.used for source in together] == [source.used for source in alone]


def test_a_source_that_is_there_twice_repeats_nothing() -> None:
    (source,) = sources(1)
    rows = np.zeros((2, 64), np.float32)

    released = add_noise_to_rows(
        rows, stds=[1.0] * 2, sensitivities=[1.0] * 2, sources=[source, source]
    )
    drawn = draw_uniform_rows([source, source], np.array([8, 8]), with_noise=True)

    assert not np.array_equal(released[0], released[1])
    assert not set(drawn[0]) & set(drawn[1])


def test_sources_that_protect_serve_rows_too() -> None:
    mixed = [secure_source(), *sources(1)]

    drawn = draw_uniform_rows(mixed, np.array([3, 2]), with_noise=True)

    assert drawn.shape == (2, 3)
    assert ((drawn >= 0) & (drawn < 1))[0].all()
    assert drawn[1, 2] == 1


def test_rows_and_sources_that_do_not_match_are_refused() -> None:
    rows = np.zeros((2, 4), np.float32)

    with pytest.raises(ValueError, match="not one for each"):
        add_noise_to_rows(rows, stds=[1.0] * 2, sensitivities=[1.0] * 2, sources=sources(1))
