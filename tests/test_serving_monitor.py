"""Drift, calibration, subgroups, metrics and explanations, against independent oracles."""

import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from fairlearn.metrics import (
    MetricFrame,
    count,
    false_positive_rate,
    selection_rate,
    true_positive_rate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from release_samples import MODEL, SIGNATURE, release_files, sigmoid_of, valid_inputs
from scipy.stats import ks_2samp
from serving_client import ask
from sklearn.metrics import brier_score_loss, confusion_matrix, precision_score

from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.server.registry import Registry
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.drift import (
    DriftMonitor,
    kolmogorov_smirnov,
    parse_monitor,
    population_stability,
)
from fedward.serving.engine import start_engine
from fedward.serving.explain import explain, reference_input
from fedward.serving.outcomes import brier, by_group, calibration_error
from fedward.serving.service import Service

_MONITOR = {
    "format": 1,
    "fields": {
        "age": {"edges": [18, 40, 60, 80, 120], "shares": [0.2, 0.4, 0.3, 0.1], "missing": 0.0},
        "sex": {"edges": [-0.5, 0.5, 1.5], "shares": [0.4, 0.5], "missing": 0.1},
    },
    "prediction": {"edges": [0, 0.5, 1], "shares": [0.5, 0.5], "missing": 0.0},
}


def _app(folder: Path, *, monitor: bool = True) -> App:
    identity = Identity.generate_publisher()

    def build(version: int) -> dict[str, bytes]:
        extra = {"monitor.json": json.dumps(_MONITOR).encode()} if monitor else {}
        return {**release_files(version), **extra}

    release = read_release(
        Registry(folder / "registry").add(MODEL, build, identity=identity), identity.public
    )
    return App(Service(Catalogue([start_engine(release)]), state=folder))


# --- drift -------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 500), min_size=2, max_size=8), st.integers(0, 10**6))
def test_the_stability_index_is_the_sum_over_bins(counts: list[int], seed: int) -> None:
    reference = np.random.default_rng(seed).dirichlet(np.full(len(counts), 5.0)) + 0.01
    now = np.array(counts, float)
    p, q = now / now.sum(), reference / reference.sum()
    by_hand = sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))

    assert population_stability(now, reference) == pytest.approx(by_hand, rel=0.05, abs=1e-3)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 10**6))
def test_the_distance_of_distributions_is_scipys(values: list[int], seed: int) -> None:
    other = np.random.default_rng(seed).integers(5, size=40)
    now = np.bincount(values, minlength=5).astype(float)
    reference = np.bincount(other, minlength=5).astype(float)

    got = kolmogorov_smirnov(now, reference)

    assert got == pytest.approx(ks_2samp(values, other, method="asymp").statistic, abs=1e-12)


def test_patients_like_the_reference_raise_no_alarm_and_older_ones_do() -> None:
    # 1000 rows in 5 bins: the index of a sample from the reference is about chi2(4) / 1000, so
    # that 0.2 is passed with a probability below 1e-40.
    rng = np.random.default_rng(3)
    monitor = DriftMonitor(SIGNATURE, parse_monitor(_MONITOR))
    inputs = valid_inputs(1000)
    bins = rng.choice(4, 1000, p=[0.2, 0.4, 0.3, 0.1])
    inputs[:, 0] = np.array([30, 50, 70, 90])[bins]
    outputs = rng.uniform(size=(1000, 1)).astype(np.float32)
    monitor.see(inputs, outputs)
    before = {shift.name: shift for shift in monitor.shifts()}

    inputs[:, 0] = 90
    for row, output in zip(inputs, outputs, strict=True):
        monitor.see(row[None], output[None])
    after = {shift.name: shift for shift in monitor.shifts()}

    assert not before["age"].alarm
    assert after["age"].alarm
    assert after["age"].ks > 0.3
    assert set(before) == {"age", "sex", "prediction"}


def test_the_window_is_bounded_and_keeps_the_latest() -> None:
    monitor = DriftMonitor(SIGNATURE, parse_monitor(_MONITOR))
    for age in (30, 90):
        inputs = np.full((3000, 4), age, np.float32)
        monitor.see(inputs, np.zeros((3000, 1), np.float32))

    shift = next(s for s in monitor.shifts() if s.name == "age")
    assert shift.rows == 2048
    assert shift.ks == pytest.approx(0.9)


# --- outcomes ----------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_rates_and_calibration_equal_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities, outcomes = rng.uniform(size=300), rng.random(300) < 0.4
    groups = rng.choice(["female", "male"], 300).tolist()
    positive = probabilities >= 0.5

    assert brier(probabilities, outcomes) == pytest.approx(
        brier_score_loss(outcomes, probabilities), abs=1e-12
    )
    for group, rates in by_group(positive, outcomes, groups).items():
        mine = np.array(groups) == group
        tn, fp, fn, tp = confusion_matrix(outcomes[mine], positive[mine]).ravel()
        assert rates["tpr"] == pytest.approx(tp / (tp + fn), abs=1e-12)
        assert rates["fpr"] == pytest.approx(fp / (fp + tn), abs=1e-12)
        assert rates["ppv"] == pytest.approx(tp / (tp + fp), abs=1e-12)
        assert rates["selection_rate"] == pytest.approx(positive[mine].mean(), abs=1e-12)


@settings(deadline=None)  # it imports fairlearn
@given(st.integers(0, 10**6))
def test_subgroup_rates_equal_fairlearns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outcomes, positive = rng.random(200) < 0.4, rng.random(200) < 0.5
    groups = rng.choice(["female", "male", "not stated"], 200, p=[0.5, 0.4, 0.1]).tolist()
    frame = MetricFrame(
        metrics={
            "tpr": true_positive_rate,
            "fpr": false_positive_rate,
            "ppv": lambda truth, said: precision_score(truth, said, zero_division=np.nan),
            "selection_rate": selection_rate,
            "count": count,
        },
        y_true=outcomes,
        y_pred=positive,
        sensitive_features=groups,
    )

    ours = by_group(positive, outcomes, groups)

    assert set(ours) == set(frame.by_group.index)
    for group, rates in ours.items():
        # A rate over nobody is left out here, 0 or NaN there.
        for name, value in rates.items():
            assert value == pytest.approx(frame.by_group.loc[group, name], abs=1e-9), name


def test_calibration_error_by_hand() -> None:
    # Bins .2: says .25, is .5 (2 of 4); .8: says .85, is 1 (1 of 4); .9: says .95, is 0 (1 of 4).
    probabilities = np.array([0.25, 0.25, 0.85, 0.95])
    outcomes = np.array([True, False, True, False])

    wanted = 0.5 * 0.25 + 0.25 * 0.15 + 0.25 * 0.95
    assert calibration_error(probabilities, outcomes) == pytest.approx(wanted)


def test_outcomes_arrive_by_receipt_once_and_survive_a_restart(tmp_path: Path) -> None:
    app = _app(tmp_path)
    receipts = [
        ask(app, "POST", "/predict", {"age": age, "sex": "male"}).json["receipt"]
        for age in (30, 60, 90)
    ]
    bodies = [
        {"receipt": receipt, "outcome": outcome, "groups": {"sex": "male"}}
        for receipt, outcome in zip(receipts, (False, True, True), strict=True)
    ]

    assert [ask(app, "POST", "/outcomes", body).status for body in bodies] == [200] * 3
    assert ask(app, "POST", "/outcomes", bodies[0]).status == 409
    again = App(Service(app.service.catalogue, state=tmp_path))
    for asked in (app, again):
        report = ask(asked, "GET", "/monitor").json["calibration"]
        assert report["outcomes"] == 3
        assert report["subgroups"]["sex"]["male"]["count"] == 3
    assert ask(again, "POST", "/outcomes", bodies[1]).status == 409


@pytest.mark.parametrize(
    "change",
    [
        {"receipt": "A" * 64},
        {"receipt": None},
        {"receipt": "é"},
        {"outcome": 1},
        {"groups": {"sex": 1}},
        {"groups": {str(i): "x" for i in range(9)}},
    ],
)
def test_a_wrong_outcome_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    app = _app(tmp_path)
    receipt = ask(app, "POST", "/predict", {"age": 30}).json["receipt"]

    reply = ask(app, "POST", "/outcomes", {"receipt": receipt, "outcome": True, **change})

    assert reply.status == 422
    assert reply.json["field"] in change


def test_a_receipt_tells_nothing_of_the_patient_and_outcomes_neither(tmp_path: Path) -> None:
    app = _app(tmp_path)
    receipt = ask(app, "POST", "/predict", {"age": 63.25}).json["receipt"]
    ask(app, "POST", "/outcomes", {"receipt": receipt, "outcome": True})

    assert len(receipt) <= 64
    assert "63.25" not in (tmp_path / f"outcomes-{MODEL}.jsonl").read_text()


# --- metrics -----------------------------------------------------------------------------------


def test_metrics_count_what_happened_and_name_no_patient(tmp_path: Path) -> None:
    app = _app(tmp_path)
    for body in ({"age": 63.25}, {"age": 63.25, "sex": "x"}, {"secret-name": 1}):
        ask(app, "POST", "/predict", body)
    ask(app, "GET", "/v2/models/patient-john-doe")

    text = ask(app, "GET", "/metrics").body.decode()

    assert 'fedward_requests_total{route="predict",status="200"} 1\n' in text
    assert 'fedward_requests_total{route="predict",status="422"} 2\n' in text
    assert 'fedward_request_seconds_bucket{route="predict",le="+Inf"} 3\n' in text
    assert 'fedward_predicted_rows_total{model="tiny",version="1"} 1\n' in text
    assert 'fedward_refused_values_total{model="tiny",field="sex"} 1\n' in text
    assert 'fedward_model_version{model="tiny"} 1\n' in text
    assert 'fedward_drift_psi{model="tiny",field="age"}' in text
    assert "john" not in text
    assert "secret-name" not in text
    assert all(
        line.startswith(("# TYPE fedward_", "fedward_")) and len(line.rsplit(" ", 1)) == 2
        for line in text.splitlines()
    )


# --- explanation -------------------------------------------------------------------------------


def _interacting(inputs: np.ndarray) -> np.ndarray:
    x = np.nan_to_num(inputs.astype(np.float64))
    score = 0.3 * x[:, 0] * x[:, 1] - 0.5 * x[:, 2] + 0.2 * x[:, 0] * x[:, 3] * x[:, 2]
    return (1 / (1 + np.exp(-score))).reshape(-1, 1)


def test_a_linear_models_contributions_are_exact() -> None:
    inputs = np.array([63, 1, 240, 1], np.float32)
    reference = np.array([50, 0, 200, 0], np.float32)

    explanation = explain(sigmoid_of, inputs, reference)

    np.testing.assert_allclose(
        explanation.contributions, [0.02 * 13, 0.7, 0.003 * 40, 0.5], atol=2e-5
    )


def test_contributions_add_up_to_the_answer() -> None:
    inputs, reference = np.array([1, 2, 3, 1], np.float32), np.zeros(4, np.float32)

    explanation = explain(_interacting, inputs, reference)

    total = explanation.reference + explanation.contributions.sum()
    assert total == pytest.approx(explanation.log_odds, abs=1e-9)


def test_contributions_are_near_the_exact_shapley_values() -> None:
    inputs, reference = np.array([1, 1, 1, 1], np.float32), np.zeros(4, np.float32)
    exact = np.zeros(4)
    for order in itertools.permutations(range(4)):
        row = reference.copy()
        for column in order:
            before = _interacting(row[None])[0, 0]
            row[column] = inputs[column]
            after = _interacting(row[None])[0, 0]
            exact[column] += math.log(after / (1 - after)) - math.log(before / (1 - before))
    exact /= math.factorial(4)

    explanation = explain(_interacting, inputs, reference)

    # 8 antithetic pairs of an effect of at most .3: fixed by the seed, far from chance.
    np.testing.assert_allclose(explanation.contributions, exact, atol=0.06)


def test_thirty_fields_are_explained_within_the_bar() -> None:
    weights = np.random.default_rng(0).normal(size=30)

    def predict(inputs: np.ndarray) -> np.ndarray:
        return (1 / (1 + np.exp(-(inputs @ weights) / 9))).reshape(-1, 1)

    inputs = np.random.default_rng(1).normal(size=30).astype(np.float32)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        explain(predict, inputs, np.zeros(30, np.float32))
        seconds.append(time.perf_counter() - start)

    assert min(seconds) < 0.005  # the least: others share this machine


def test_the_reference_is_of_the_private_histograms_or_of_nobody() -> None:
    with_histograms = reference_input(SIGNATURE, parse_monitor(_MONITOR))
    without = reference_input(SIGNATURE, {})

    np.testing.assert_allclose(with_histograms[:2], [29 * 0.2 + 50 * 0.4 + 70 * 0.3 + 10, 1])
    np.testing.assert_array_equal(without, [69, np.nan, np.nan, np.nan])


def test_an_explanation_is_answered_with_the_prediction(tmp_path: Path) -> None:
    app = _app(tmp_path, monitor=False)

    answer = ask(app, "POST", "/explain", {"age": 63, "sex": "male"}).json

    parts = {c["field"]: c["contribution"] for c in answer["explanation"]["contributions"]}
    assert parts["sex"] == pytest.approx(0.7, abs=1e-5)
    assert parts["smoker"] == pytest.approx(0, abs=1e-6)
    assert "not a cause" in answer["explanation"]["meaning"]


def test_version_one_of_the_protocol_predicts_and_explains(tmp_path: Path) -> None:
    app = _app(tmp_path)
    rows = [[63, 1, 240, None], [30, 0, None, 1]]
    wanted = sigmoid_of(np.array(rows, np.float32))[:, 0].tolist()
    named = [{"age": 63, "sex": "male", "cholesterol": 240}, {"age": 30, "sex": 0, "smoker": True}]

    for instances in (rows, named):
        reply = ask(app, "POST", "/v1/models/tiny:predict", {"instances": instances})
        assert reply.json["predictions"] == pytest.approx(wanted, abs=1e-6)
    explained = ask(app, "POST", "/v1/models/tiny:explain", {"instances": rows}).json

    assert len(explained["explanations"]) == 2
    wrong: list[list[object]] = [[], [[1]], [["x"] * 4], [3]]
    for instances_ in wrong:
        body = {"instances": instances_}
        assert ask(app, "POST", "/v1/models/tiny:predict", body).status == 400
    too_many = {"instances": [rows[0]] * 33}
    assert ask(app, "POST", "/v1/models/tiny:explain", too_many).status == 413
