import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedward.client.training.prefetch import Prefetched, drawing_ahead
from fedward.privacy.mechanisms import secure_source, simulated_source
from fedward.privacy.mechanisms.normal import RESOLUTION


def test_numbers_drawn_ahead_are_used_once() -> None:
    source = Prefetched(secure_source(), steps=50)

    normal = np.concatenate([drawn_steps(source, 7) for _ in range(5_000)])
    uniform = np.concatenate([source.uniform(3) for _ in range(5_000)])

    # Fewer than a hundred of 35,000 whole numbers near 10^7 are to be expected twice.
    assert len(normal) == 35_000
    assert len(np.unique(normal)) > 34_800
    assert len(np.unique(uniform)) == len(uniform) == 15_000
    # False alarms at 1e-9 each.
    assert stats.kstest(normal / RESOLUTION, "norm").pvalue > 1e-9
    assert stats.kstest(uniform, "uniform").pvalue > 1e-9


def test_sizes_may_change_and_be_large() -> None:
    source = Prefetched(secure_source(), steps=3)

    sizes = (0, 5, 1, 20_000, 9_000, 5)

    drawn = np.concatenate([drawn_steps(source, size) for size in sizes])
    doubles = np.concatenate([source.gaussian(size, std=2.0) for size in sizes])

    assert len(drawn) == len(doubles) == 29_011
    for values in (drawn / RESOLUTION, doubles / 2.0):
        assert len(np.unique(values)) > 28_800
        assert stats.kstest(values, "norm").pvalue > 1e-9


def test_a_source_that_repeats_keeps_its_order() -> None:
    source = simulated_source(1)

    assert drawing_ahead(source, steps=100) is source
    assert drawing_ahead(secure_source(), steps=100).private


def test_a_source_of_another_make_is_drawn_ahead_too() -> None:
    class Plain:
        private = True

        def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:
            return np.arange(size, dtype=np.float64) * std

        def uniform(self, size: int) -> NDArray[np.float64]:
            return np.zeros(size)

    source = Prefetched(Plain(), steps=3)

    drawn = [drawn_steps(source, 2) for _ in range(4)]

    expected = [[0, 1], [2, 3], [4, 5], [0, 1]]
    np.testing.assert_array_equal(drawn, np.array(expected) * RESOLUTION)


def drawn_steps(source: Prefetched, size: int) -> NDArray[np.int32]:
    out = np.full(size, np.iinfo(np.int32).min, np.int32)
    with source.drawing(size) as draw:
        draw(out)
    return out
