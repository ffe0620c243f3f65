import numpy as np
from scipy import stats

from fedward.client.training.prefetch import Prefetched, drawing_ahead
from fedward.privacy.mechanisms import secure_source, simulated_source


def test_numbers_drawn_ahead_are_used_once() -> None:
    source = Prefetched(secure_source(), steps=50)

    normal = np.concatenate([source.gaussian(7, std=2.0) for _ in range(5_000)])
    uniform = np.concatenate([source.uniform(3) for _ in range(5_000)])

    assert len(np.unique(normal)) == len(normal) == 35_000
    assert len(np.unique(uniform)) == len(uniform) == 15_000
    # False alarms at 1e-9 each.
    assert stats.kstest(normal / 2.0, "norm").pvalue > 1e-9
    assert stats.kstest(uniform, "uniform").pvalue > 1e-9


def test_sizes_may_change_and_be_large() -> None:
    source = Prefetched(secure_source(), steps=3)

    drawn = [source.gaussian(size, std=1.0) for size in (0, 5, 1, 20_000, 9_000, 5)]

    assert [len(part) for part in drawn] == [0, 5, 1, 20_000, 9_000, 5]
    assert len(np.unique(np.concatenate(drawn))) == 29_011


def test_a_source_that_repeats_keeps_its_order() -> None:
    source = simulated_source(1)

    assert drawing_ahead(source, steps=100) is source
    assert drawing_ahead(secure_source(), steps=100).private


def test_what_is_drawn_into_memory_is_used_once_too() -> None:
    source = Prefetched(secure_source(), steps=100)
    drawn = [np.empty(size) for size in (7, 7, 20_000, 7)]

    for memory in drawn:
        source.fill_gaussian(memory, std=2.0)

    everything = np.concatenate(drawn)
    assert len(np.unique(everything)) == everything.size
    assert 1.9 < everything.std() < 2.1
