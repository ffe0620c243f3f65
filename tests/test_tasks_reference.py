"""Reference histograms: bins, counts, sensitivity, and what becomes of noisy counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from fedward.serving.drift import parse_monitor
from fedward.tasks import datasets, reference
from fedward.tasks.registry import get_task

SCHEMA = get_task("heart-disease").schema
LAYOUT = reference.layout(SCHEMA, bins=5)


def test_a_histogram_counts_as_numpy_does_and_its_outer_bins_are_open() -> None:
    bins = reference.Bins("age", (30.0, 40.0, 50.0))
    values = np.array([10.0, 35.0, 40.0, 99.0, np.nan])

    assert bins.count(values).tolist() == [2, 2, 1]
    inside = np.random.default_rng(1).uniform(30, 50, 1000)
    assert bins.count(inside)[:-1].tolist() == np.histogram(inside, bins=bins.edges)[0].tolist()


def test_every_row_is_once_in_every_histogram() -> None:
    table = datasets.load("heart-disease", partition="va")
    counts = reference.count(LAYOUT, table.columns, np.full(len(table), 0.3))
    parts = np.split(counts, np.cumsum([one.cells for one in LAYOUT])[:-1])

    assert [part.sum() for part in parts] == [len(table)] * 14
    flags = table.columns["sex"]
    assert parts[1].tolist() == [(flags == 0).sum(), (flags == 1).sum(), np.isnan(flags).sum()]


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
def test_one_patient_moves_them_by_no_more_than_the_sensitivity(
    seed: int, most: int, rows: int
) -> None:
    rng = np.random.default_rng(seed)
    table = datasets.load("heart-disease", partition="va")
    drawn = table.take(rng.integers(0, len(table), 12))
    owners = ("a",) * rows + tuple("bcdefghijklm")[: 12 - rows]
    answers = rng.random(12)

    def counted(keep: list[int]) -> np.ndarray:
        chosen = [keep[i] for i in reference.first_rows([owners[k] for k in keep], most=most)]
        return reference.count(LAYOUT, drawn.take(chosen).columns, answers[chosen])

    with_patient = counted(list(range(12)))
    without = counted(list(range(rows, 12)))

    moved = np.linalg.norm(with_patient - without)
    assert moved <= most * np.sqrt(len(LAYOUT)) + 1e-9
    if rows == 1:
        assert moved == pytest.approx(np.sqrt(14))


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6))
def test_the_nearest_shares_are_those_that_a_solver_finds(values: list[float]) -> None:
    given_values = np.array(values)
    ours = reference.nearest_shares(given_values)
    solved = minimize(
        lambda x: ((x - given_values) ** 2).sum(),
        np.full(len(values), 1 / len(values)),
        bounds=[(0, 1)] * len(values),
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )

    assert ours.sum() == pytest.approx(1)
    assert (ours >= 0).all()
    assert ((ours - given_values) ** 2).sum() <= ((solved.x - given_values) ** 2).sum() + 1e-7


def test_exact_counts_become_exact_shares_that_the_adapter_reads() -> None:
    table = datasets.load("heart-disease", partition="cleveland")
    answers = np.linspace(0, 1, len(table))
    counts = reference.count(LAYOUT, table.columns, answers)

    monitor = reference.monitor_json(LAYOUT, counts, noise_std=0.0)

    assert monitor is not None
    histograms = parse_monitor(monitor)
    for field in SCHEMA.features:
        values = table.columns[field.name].astype(np.float32)
        now = histograms[field.name].count(values) / len(table)
        np.testing.assert_allclose(now, histograms[field.name].whole, atol=1e-8)
        assert histograms[field.name].noise == 0.0


def test_where_noise_leaves_nothing_there_is_no_monitor() -> None:
    counts = np.random.default_rng(3).normal(0, 50, reference.size(LAYOUT))

    assert reference.monitor_json(LAYOUT, counts, noise_std=50.0) is None
