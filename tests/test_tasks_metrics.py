"""Metrics from sums equal the exact ones of scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from fedward.tasks import datasets
from fedward.tasks.heart_disease import HEART_DISEASE as TASK
from fedward.tasks.metrics import binary_sums, summarise_binary
from fedward.tasks.task import add_sums

Predictions = dict[str, tuple[NDArray[np.float64], NDArray[np.float32]]]
HOSPITALS = tuple(datasets.partitions("heart-disease"))


@pytest.fixture(scope="module")
def real() -> Predictions:
    """Each hospital's probabilities by a model that was fitted on all, and its labels."""
    tables = {h: datasets.load("heart-disease", partition=h) for h in HOSPITALS}
    examples = {h: TASK.prepare(table, None) for h, table in tables.items()}
    model = LogisticRegression().fit(
        np.concatenate([e.features for e in examples.values()]),
        np.concatenate([e.labels for e in examples.values()]),
    )
    return {
        h: (model.predict_proba(e.features)[:, 1], e.labels.astype(np.float32))
        for h, e in examples.items()
    }


@pytest.mark.parametrize("hospital", HOSPITALS)
def test_a_hospital_s_metrics_are_scikit_learn_s(real: Predictions, hospital: str) -> None:
    p, y = real[hospital]

    found = summarise_binary(binary_sums(p, y))

    assert found["auroc"] == pytest.approx(roc_auc_score(y, p), abs=1e-3)
    assert found["accuracy"] == pytest.approx(accuracy_score(y, p >= 0.5))
    assert found["brier"] == pytest.approx(brier_score_loss(y, p))
    assert found["log_loss"] == pytest.approx(log_loss(y, p))
    assert found["prevalence"] == pytest.approx(y.mean())
    assert found["num_examples"] == len(y)


def test_sums_of_hospitals_give_the_pooled_metrics(real: Predictions) -> None:
    p = np.concatenate([p for p, _ in real.values()])
    y = np.concatenate([y for _, y in real.values()])

    found = summarise_binary(add_sums(binary_sums(*site) for site in real.values()))

    assert found["auroc"] == pytest.approx(roc_auc_score(y, p), abs=1e-3)
    assert found["brier"] == pytest.approx(brier_score_loss(y, p))
    assert found["num_examples"] == 920


def test_rare_outcomes_with_tiny_probabilities_are_ranked() -> None:
    rng = np.random.default_rng(3)
    log_odds = rng.normal(-6, 1, 20_000)
    y = (rng.random(20_000) < 1 / (1 + np.exp(-log_odds))).astype(np.float64)
    p = 1 / (1 + np.exp(-log_odds))

    found = summarise_binary(binary_sums(p, y))

    assert found["auroc"] == pytest.approx(roc_auc_score(y, p), abs=1e-3)


@settings(max_examples=100)
@given(
    p=npst.arrays(np.float64, 30, elements=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
    y=npst.arrays(np.float64, 30, elements=st.sampled_from([0.0, 1.0])),
    at=st.integers(0, 30),
)
def test_ties_and_extremes_are_exact_and_any_division_adds_up(
    p: NDArray[np.float64], y: NDArray[np.float64], at: int
) -> None:
    whole = binary_sums(p, y)
    parts = add_sums([binary_sums(p[:at], y[:at]), binary_sums(p[at:], y[at:])])

    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-12, atol=1e-12)
    summary = summarise_binary(parts)
    if 0 < y.sum() < 30:
        assert summary["auroc"] == pytest.approx(roc_auc_score(y, p))
    else:
        assert "auroc" not in summary


def test_nobody_held_out_has_no_metrics() -> None:
    assert summarise_binary(binary_sums(np.zeros(0), np.zeros(0))) == {"num_examples": 0}


def test_a_task_counts_its_model_s_outputs() -> None:
    outputs = torch.tensor([[2.0], [-1.0], [0.5]], requires_grad=True)
    labels = torch.tensor([1.0, 0.0, 0.0])

    summary = TASK.summarise(TASK.metrics(outputs, labels))

    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["auroc"] == 1
    assert summary["log_loss"] == pytest.approx(TASK.loss(outputs, labels).mean().item())


@pytest.mark.parametrize(
    ("p", "y"), [([0.5], [0.0, 1.0]), ([1.5], [1.0]), ([np.nan], [1.0]), ([0.5], [2.0])]
)
def test_what_is_no_probability_or_label_is_refused(p: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match=r"shape|within|labels"):
        binary_sums(np.array(p), np.array(y))


def test_sums_of_another_shape_are_refused() -> None:
    sums = binary_sums(np.array([0.5]), np.array([1.0]))

    with pytest.raises(ValueError, match="lack"):
        summarise_binary({"histogram": sums["histogram"]})
    with pytest.raises(ValueError, match="shape"):
        summarise_binary(sums | {"histogram": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="different arrays"):
        add_sums([sums, {"histogram": sums["histogram"]}])


@settings(max_examples=100)
@given(
    p=npst.arrays(np.float64, 20, elements=st.floats(0, 1)),
    y=npst.arrays(np.float64, 20, elements=st.sampled_from([0.0, 1.0])),
    one=st.integers(0, 19),
)
def test_one_patient_moves_what_is_released_by_exactly_one(
    p: NDArray[np.float64], y: NDArray[np.float64], one: int
) -> None:
    everybody = TASK.private_metrics(binary_sums(p, y))
    without = TASK.private_metrics(binary_sums(np.delete(p, one), np.delete(y, one)))

    moved = np.concatenate([(everybody[name] - without[name]).reshape(-1) for name in everybody])

    assert np.linalg.norm(moved) == 1
    assert np.abs(moved).sum() == 1


def test_released_metrics_are_near_the_exact_ones(real: Predictions) -> None:
    for p, y in real.values():
        found = TASK.summarise_private(TASK.private_metrics(binary_sums(p, y)))

        # Twenty cells of probability: half a cell, .025, is the most that a value is off.
        assert found["num_examples"] == len(y)
        assert found["prevalence"] == pytest.approx(y.mean())
        assert found["accuracy"] == pytest.approx(accuracy_score(y, p >= 0.5))
        assert found["auroc"] == pytest.approx(roc_auc_score(y, p), abs=0.02)
        assert found["brier"] == pytest.approx(brier_score_loss(y, p), abs=0.01)


def test_noise_below_zero_counts_as_nobody() -> None:
    empty = TASK.private_metrics(binary_sums(np.zeros(0), np.zeros(0)))["histogram"]

    assert TASK.summarise_private({"histogram": empty - 3}) == {"num_examples": 0}
    with pytest.raises(ValueError, match="shape"):
        TASK.summarise_private({"histogram": np.zeros((2, 3))})
