"""LIME: what the line around a patient says, and that it is the authors' line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from release_samples import SIGNATURE, WEIGHTS, publish_sample, sigmoid_of
from serving_client import ask

from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving.app import App
from fedward.serving.catalogue import Catalogue
from fedward.serving.drift import parse_monitor
from fedward.serving.engine import start_engine
from fedward.serving.lime import LocalLine, explain_locally, weighted_ridge
from fedward.serving.service import Service

_IDENTITY = Identity.generate_publisher()
_MONITOR: dict[str, Any] = {
    "format": 1,
    "fields": {
        "age": {"edges": [20, 40, 60, 100], "shares": [0.25, 0.5, 0.25], "missing": 0.0},
        "sex": {"edges": [-0.5, 0.5, 1.5], "shares": [0.4, 0.6], "missing": 0.0},
        "cholesterol": {"edges": [100, 200, 300], "shares": [0.5, 0.4], "missing": 0.1},
        "smoker": {"edges": [-0.5, 0.5, 1.5], "shares": [0.3, 0.1], "missing": 0.6},
    },
    "prediction": {"edges": [0, 0.5, 1], "shares": [0.5, 0.5], "missing": 0.0},
}
_HISTOGRAMS = parse_monitor(_MONITOR)
_MEANS = np.array([0.25 * 30 + 0.5 * 50 + 0.25 * 80, 0.6, (0.5 * 150 + 0.4 * 250) / 0.9])


def _probabilities(log_odds: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(1 / (1 + np.exp(-log_odds[:, None])), np.float32)


def _explain(predict: Any, row: list[float], **more: Any) -> LocalLine:
    return explain_locally(predict, np.array(row, np.float32), SIGNATURE, _HISTOGRAMS, **more)


@settings(deadline=None, max_examples=40)
@given(
    weights=hnp.arrays(float, 3, elements=st.floats(-0.05, 0.05)),
    age=st.integers(20, 100),
    cholesterol=st.integers(100, 300),
    sex=st.integers(0, 1),
)
def test_of_a_linear_model_it_finds_the_weights(
    weights: NDArray[np.float64], age: int, cholesterol: int, sex: int
) -> None:
    scale = np.array([1.0, 20.0, 1.0])

    def predict(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        log_odds = (rows[:, :3].astype(float) - _MEANS) @ (weights * scale)
        return _probabilities(log_odds)

    line = _explain(predict, [age, sex, cholesterol, np.nan], samples=4000)

    # A weight times the distance from the mean; the ridge shrinks by about 1 in the weights' sum.
    wanted = weights * scale * (np.array([age, sex, cholesterol]) - _MEANS)
    np.testing.assert_allclose(line.contributions[:3], wanted, rtol=0.02, atol=0.01)
    assert abs(line.contributions[3]) < 0.01
    assert abs(line.reference) < 0.02
    assert line.fit > 0.99 or np.abs(weights).max() < 0.002


def test_a_model_that_is_no_line_is_said_to_be_none() -> None:
    def predict(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        wave = np.sin(rows[:, 0] * 5) * 2
        return _probabilities(wave)

    line = _explain(predict, [50, 1, 200, 0])

    assert line.fit < 0.2


def test_the_same_question_gets_the_same_answer_and_another_is_drawn_anew() -> None:
    one, again = _explain(sigmoid_of, [63, 1, 240, 1]), _explain(sigmoid_of, [63, 1, 240, 1])
    other = _explain(sigmoid_of, [64, 1, 240, 1])

    np.testing.assert_array_equal(one.contributions, again.contributions)
    assert one.fit != other.fit


def test_what_is_missing_contributes_too() -> None:
    def predict(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        log_odds = 2.0 * np.isnan(rows[:, 2]) - 1
        return _probabilities(log_odds)

    line = _explain(predict, [50, 1, np.nan, 0])

    assert line.contributions[2] == pytest.approx(2 * (1 - 0.1), rel=0.02)
    assert np.abs(np.delete(line.contributions, 2)).max() < 0.02


_LIME = """
import json, sys
import numpy as np
from lime.lime_base import LimeBase
asked = json.load(sys.stdin)
features, scores, distances = (np.array(asked[n]) for n in ("features", "scores", "distances"))
width = 0.75 * np.sqrt(features.shape[1])
base = LimeBase(lambda d: np.sqrt(np.exp(-(d ** 2) / width ** 2)))
intercept, slopes, fit, _ = base.explain_instance_with_data(
    features, scores[:, None], distances, 0, features.shape[1], feature_selection="none")
json.dump([[slope for _, slope in sorted(slopes)], float(intercept), float(fit)], sys.stdout)
"""


def test_the_line_is_the_authors_packages() -> None:
    python = os.environ.get("FEDWARD_ORACLES_PYTHON")
    if python is None and importlib.util.find_spec("lime") is None:
        pytest.skip("needs lime: FEDWARD_ORACLES_PYTHON names a Python that has it")
    rng = np.random.default_rng(1)
    features = rng.normal(size=(300, 5))
    scores = np.tanh(features @ rng.normal(size=5)) + rng.normal(size=300)
    distances = np.sqrt((features**2).sum(axis=1))
    weights = np.exp(-(distances**2) / (0.75**2 * 5) / 2)
    asked = {"features": features.tolist(), "scores": scores.tolist()}

    slopes, intercept, fit = weighted_ridge(features, scores, weights, ridge=1.0)
    done = subprocess.run(
        [python or sys.executable, "-W", "ignore", "-c", _LIME],
        input=json.dumps({**asked, "distances": distances.tolist()}),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    wanted = json.loads(done.stdout)
    np.testing.assert_allclose(slopes, wanted[0], atol=1e-9)
    assert intercept == pytest.approx(wanted[1], abs=1e-9)
    assert fit == pytest.approx(wanted[2], abs=1e-9)


def _app(folder: Path, **more: Any) -> App:
    release = read_release(publish_sample(folder, _IDENTITY, **more), _IDENTITY.public)
    return App(Service(Catalogue([start_engine(release)])))


def test_it_is_asked_for_by_name_and_says_how_well_it_fits(tmp_path: Path) -> None:
    app = _app(tmp_path, monitor=_MONITOR)
    patient = {"age": 63, "sex": "male", "cholesterol": 240, "smoker": False}

    said = ask(app, "POST", "/explain?method=lime", patient).json["explanation"]
    rows = {"instances": [patient, {"age": 40}]}
    first = ask(app, "POST", "/v1/models/tiny:explain?method=lime", rows).json["explanations"]
    usual = ask(app, "POST", "/explain", patient).json["explanation"]
    wrong = ask(app, "POST", "/explain?method=magic", patient)

    by_field = {part["field"]: part["contribution"] for part in said["contributions"]}
    assert said["method"] == "lime"
    assert 0.9 < said["r2"] < 1  # a smoker who is not one and one of whom it is missing score alike
    assert "not a cause" in said["meaning"]
    assert by_field["age"] == pytest.approx(float(WEIGHTS[0]) * (63 - _MEANS[0]), rel=0.05)
    assert by_field["sex"] == pytest.approx(float(WEIGHTS[1]) * 0.4, rel=0.05)
    assert first[0] == said
    assert usual["method"] == "shapley"
    assert "r2" not in usual
    assert (wrong.status, wrong.json["allowed"]) == (422, "shapley, lime, occlusion")


def test_without_a_reference_there_is_nothing_to_draw_from(tmp_path: Path) -> None:
    answer = ask(_app(tmp_path), "POST", "/explain?method=lime", {"age": 63})

    assert answer.status == 422
    assert "[monitor]" in answer.json["error"]
