"""The model card: calibration, subgroups, what is suppressed, and every field that is asked for."""

import json
import re
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
from release_samples import PRIVACY, SIGNATURE
from sklearn.calibration import calibration_curve
from studies import NO_PRIVACY, write_study

from fedward.client.evaluation import evaluate_groups, evaluate_model
from fedward.client.local_site import LocalSite
from fedward.core.errors import AggregationAborted, ConfigError
from fedward.core.study import load_study
from fedward.server.card import NOT_STATED, card_json
from fedward.server.card_html import card_html
from fedward.server.statement import privacy_statement
from fedward.simulations.simulate import prepare_run, released_parameters, simulate
from fedward.tasks import datasets
from fedward.tasks.metrics import binary_sums, calibration_of, coarse_histogram
from fedward.tasks.parameters import from_vector
from fedward.tasks.registry import get_task
from fedward.tasks.subgroups import groupings, of_everybody, of_group

TASK = get_task("heart-disease")
GROUPS = "\n[evaluation]\nsubgroups = { sex = [], age = [45, 65] }\n"
TRAINING = {"study": "tiny", "study_hash": "0" * 64, "rounds": 3, "sites": ["cleveland", "va"]}


def card_of(metrics: dict[str, Any], *, mode: str = "local", **about: str) -> dict[str, Any]:
    statement = privacy_statement({**PRIVACY, "mode": mode})
    return card_json(
        SIGNATURE, statement=statement, metrics=metrics, training=TRAINING, about=about
    )


# --- calibration -------------------------------------------------------------------------------


def test_reliability_is_scikit_learns_where_cells_hold_one_probability() -> None:
    rng = np.random.default_rng(3)
    p = (rng.integers(0, 20, 4000) + 0.5) / 20
    y = rng.random(4000) < p**1.5

    found = calibration_of(coarse_histogram(binary_sums(p, y.astype(np.float64))))

    observed, predicted = calibration_curve(y, p, n_bins=10)
    np.testing.assert_allclose([one["observed"] for one in found["bins"]], observed)
    np.testing.assert_allclose([one["predicted"] for one in found["bins"]], predicted)
    shares = np.array([one["num_examples"] for one in found["bins"]]) / 4000
    assert found["ece"] == pytest.approx(float((shares * np.abs(observed - predicted)).sum()))


def test_noise_on_empty_cells_makes_no_patients() -> None:
    """The total is unbiased: with 1e-9 it is within 6.2 of its standard deviations."""
    rng = np.random.default_rng(4)
    histogram = np.zeros((2, 20))
    histogram[:, 10] = 30
    noisy = histogram + rng.normal(0, 4, (2, 20))

    summary = TASK.summarise_private({"histogram": noisy})

    assert abs(summary["num_examples"] - 60) < 6.2 * 4 * np.sqrt(40)
    assert summary["num_examples"] == pytest.approx(noisy.sum())
    assert np.maximum(noisy, 0).sum() > noisy.sum() + 20  # what cutting at zero would have said


def test_bins_of_few_patients_are_not_shown_and_the_error_is_over_all() -> None:
    bins = [
        {"low": 0.0, "high": 0.1, "num_examples": 40.0, "predicted": 0.05, "observed": 0.1},
        {"low": 0.1, "high": 0.2, "num_examples": 19.0, "predicted": 0.15, "observed": 0.777},
    ]

    card = card_of({"calibration": {"bins": bins, "ece": 0.21}})
    page = card_html(card, SIGNATURE)

    assert [one["low"] for one in card["evaluation"]["calibration"]["bins"]] == [0.0]
    assert card["evaluation"]["calibration"]["not_shown"] == 1
    assert "0.210" in page
    assert "0.777" not in page


# --- subgroups ---------------------------------------------------------------------------------


def test_groups_divide_those_whose_value_is_known() -> None:
    (age,) = groupings(TASK.schema, {"age": [45, 65]})
    values = np.array([30, 45, 64.9, 65, 90, np.nan])

    assert age.labels == ("under 45", "45 to under 65", "65 and over")
    assert [members.sum() for members in age.members(values)] == [1, 2, 2]
    sums = np.sum(age.members(values), axis=0)
    assert sums.tolist() == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "asked", [{"blood": []}, {"age": []}, {"sex": [1.0]}, {"age": [65.0, 45.0]}]
)
def test_a_group_that_cannot_be_made_is_refused(asked: dict[str, list[float]]) -> None:
    with pytest.raises(ConfigError, match="subgroups"):
        groupings(TASK.schema, asked)


def test_a_groups_sums_are_those_of_its_patients_alone() -> None:
    table = datasets.load("heart-disease", partition="va")
    model = TASK.model("logistic")
    from_vector(model, np.random.default_rng(1).normal(0, 1, 28).astype(np.float32))
    groups = groupings(TASK.schema, {"sex": []})

    sums = evaluate_groups(TASK, model, table, groups, private=False)

    women = np.flatnonzero(table.columns["sex"] == 0)
    alone = evaluate_model(TASK, model, TASK.prepare(table.take(women), None))
    for name, array in of_group(sums, "sex", 0).items():
        np.testing.assert_allclose(array, alone[name])
    whole = evaluate_model(TASK, model, TASK.prepare(table, None))
    assert of_everybody(sums)["num_examples"] == whole["num_examples"]


def test_one_patient_moves_all_groups_by_what_the_noise_is_for() -> None:
    table = datasets.load("heart-disease", partition="va")
    model = TASK.model("logistic")
    groups = groupings(TASK.schema, {"sex": [], "age": [45, 65]})
    one = int(np.flatnonzero(~np.isnan(table.columns["age"]))[0])
    rest = [row for row in range(len(table)) if row != one]

    everybody = evaluate_groups(TASK, model, table, groups, private=True)
    without = evaluate_groups(TASK, model, table.take(rest), groups, private=True)

    moved = sum(((everybody[name] - without[name]) ** 2).sum() for name in everybody)
    assert moved == pytest.approx(1 + len(groups))


def test_small_groups_are_suppressed_and_without_privacy_not_betrayed_by_the_rest() -> None:
    groups = {
        "a": {"num_examples": 12.0, "auroc": 0.111},
        "b": {"num_examples": 40.0, "auroc": 0.222},
        "c": {"num_examples": 90.0, "auroc": 0.333},
    }
    metrics = {"subgroups": {"sex": groups}, "noise_std": 0.5}

    private = card_of(metrics)["evaluation"]["subgroups"]["sex"]
    exact = card_of({**metrics, "noise_std": 0.0}, mode="none")
    page = card_html(exact, SIGNATURE)

    assert (sorted(private["groups"]), private["suppressed"]) == (["b", "c"], ["a"])
    assert exact["evaluation"]["subgroups"]["sex"]["suppressed"] == ["a", "b"]
    assert "0.333" in page
    assert "0.111" not in page
    assert "0.222" not in page


def test_a_group_that_is_mostly_noise_is_not_shown() -> None:
    groups = {"a": {"num_examples": 64.0}, "b": {"num_examples": 400.0}}

    card = card_of({"subgroups": {"sex": groups}, "noise_std": 6.0})

    assert card["evaluation"]["subgroups"]["sex"]["suppressed"] == ["a"]


def test_a_run_reports_calibration_and_subgroups_within_its_budget(tmp_path: Path) -> None:
    file = write_study(tmp_path, rounds=5, extra=GROUPS)
    run = prepare_run(file, tmp_path / "run")

    simulate(file, run)

    card = json.loads((run.path / "release" / "card.json").read_text())["evaluation"]
    assert 0 <= card["calibration"]["ece"] <= 1
    assert set(card["subgroups"]) == {"sex", "age"}
    assert card["noise_std"] == pytest.approx(1.08 * np.sqrt(3 * 4), rel=0.02)
    statement = json.loads((run.path / "release" / "privacy.json").read_text())
    for site in statement["sites"].values():
        assert site["held_out_patients"]["epsilon"] <= 4.0


def test_without_privacy_a_runs_subgroups_are_exact(tmp_path: Path) -> None:
    file = write_study(tmp_path, rounds=3, privacy=NO_PRIVACY, extra=GROUPS)
    run = prepare_run(file, tmp_path / "run")
    simulate(file, run)
    study = load_study(file)
    model = TASK.model("logistic")
    from_vector(model, released_parameters(run, study))

    women = []
    for site in ("cleveland", "hungary", "switzerland", "va"):
        _, table = LocalSite(run.path / "sites" / f"{site}.toml").tables(TASK, study)
        rows = np.flatnonzero(table.columns["sex"] == 0)
        women.append(evaluate_model(TASK, model, TASK.prepare(table.take(rows), None)))
    wanted = sum(float(part["num_examples"]) for part in women)

    card = json.loads((run.path / "release" / "card.json").read_text())["evaluation"]
    assert card["subgroups"]["sex"]["groups"]["female"]["num_examples"] == wanted


def test_a_study_with_a_group_of_no_field_does_not_start(tmp_path: Path) -> None:
    file = write_study(tmp_path, extra="\n[evaluation]\nsubgroups = { blood = [] }\n")

    with pytest.raises((ConfigError, AggregationAborted), match="blood"):
        simulate(file, prepare_run(file, tmp_path / "run"))


# --- the card as a whole -----------------------------------------------------------------------

_PARTS = {
    "developer": ("name", "contact"),
    "release": ("date", "stage", "regulatory"),
    "intended_use": ("use", "users", "population", "how", "out_of_scope"),
    "warnings": ("risk_level", "bias", "subgroups"),
    "facts": (
        "output", "model_type", "foundation_model", "input_source", "time_of_prediction",
        "development_data", "bias_mitigation", "maintenance", "security", "transparency",
        "funding", "consent", "references",
    ),
    "evaluation": ("on", "pooled", "sites", "calibration", "subgroups", "suppressed"),
    "monitoring": ("drift",),
    "privacy": ("statement", "mechanism", "not_covered"),
    "training": ("study", "rounds", "sites"),
}  # fmt: skip


def test_every_field_of_the_two_labels_is_there_and_shown() -> None:
    card = card_of({}, developer="St Elsewhere", contact="ml@example.org", population="adults")
    page = card_html(card, SIGNATURE)

    for part, keys in _PARTS.items():
        for key in keys:
            assert key in card[part], (part, key)
    assert card["summary"]
    assert card["facts"]["funding"] == NOT_STATED
    for said in ("St Elsewhere", "ml@example.org", "adults", NOT_STATED):
        assert said in page


@pytest.mark.skipif(which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_card_without_asking_anybody(tmp_path: Path) -> None:
    bins = [{"low": 0.0, "high": 0.1, "num_examples": 40.0, "predicted": 0.05, "observed": 0.1}]
    page = card_html(card_of({"calibration": {"bins": bins, "ece": 0.05}}), SIGNATURE)
    (tmp_path / "card.html").write_text(page)

    shown = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'card.html'}",
        ],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip

    assert re.search(r"<h2>Calibration</h2><p>Expected calibration error <strong>0.050", shown)
    assert shown.count("<circle") == 1
