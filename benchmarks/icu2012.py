"""PhysioNet 2012 set-a for benchmarks: 23 features of 4,000 intensive-care stays, four sites.

Silva et al., Computing in Cardiology 2012 (ODC-By 1.0). One row a stay, one stay a patient. Every
number is scaled by a public clinical range written down here, which no patient decided: the
centre becomes 0, what is missing becomes 0 too, and values are cut at twice the half-range.
"""

import csv
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedward.tasks.task import Examples

# Centre and half-range, in the file's units (US conventional).
RANGES = {
    "Age": (65.0, 22.0),
    "GCS_last": (12.0, 4.0),
    "BUN_last": (22.0, 20.0),
    "HR_last": (85.0, 22.0),
    "FiO2_last": (0.45, 0.15),
    "Creatinine_last": (1.1, 0.9),
    "Bilirubin_last": (0.9, 2.0),
    "Na_last": (139.0, 6.0),
    "HCO3_last": (24.0, 5.0),
    "WBC_last": (11.0, 6.0),
    "Platelets_last": (190.0, 120.0),
    "RespRate_last": (20.0, 7.0),
    "GCS_min": (9.0, 5.0),
    "SysABP_min": (88.0, 20.0),
    "NISysABP_min": (90.0, 18.0),
    "PaO2_min": (85.0, 35.0),
    "Lactate_max": (2.5, 2.5),
    "Temp_max": (37.8, 0.8),
    "Urine_mean": (110.0, 90.0),
}
# Known at the bedside for what they say of the risk of death (SAPS II, APACHE, SOFA). `FEW` has one
# of each kind, for little budget. Compared with two other such lists, and with all.
MORE = (
    "Age",
    "GCS_last",
    "BUN_last",
    "Urine_mean",
    "Lactate_max",
    "HCO3_last",
    "Bilirubin_last",
    "HR_last",
    "SysABP_min",
    "RespRate_last",
    "FiO2_last",
    "ventilated",
    "unit 2",
)
FEW = (
    "Age",
    "GCS_last",
    "BUN_last",
    "Urine_mean",
    "Lactate_max",
    "HR_last",
    "RespRate_last",
    "unit 2",
)
MISSING = -1.0
NAMES = (*RANGES, "ventilated", "unit 1", "unit 2", "unit 3")  # and no column for unit 4
NUM_FEATURES = len(NAMES)
NUM_SITES = 4


def load(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features of shape (4000, 23) within [-1, 1], and death in hospital."""
    features, labels = [], []
    with gzip.open(folder / "icu_features.csv.gz", "rt", newline="") as stream:
        for row in csv.DictReader(stream):
            values = [_scaled(row[name], centre, half) for name, (centre, half) in RANGES.items()]
            ventilated = _number(row["MechVent_mean"])
            unit = int(float(row["ICUType"]))
            values.append(0.0 if ventilated is None else ventilated)
            values += [float(unit == kind) for kind in (1, 2, 3)]
            features.append(values)
            labels.append(float(row["In-hospital_death"]))
    return np.array(features, dtype=np.float32), np.array(labels, dtype=np.float32)


def divide(
    features: NDArray[np.float32], labels: NDArray[np.float32], *, held_out: float, seed: int
) -> tuple[list[Examples], list[Examples]]:
    """Training and held-out patients of four sites of a thousand, at random."""
    order = np.random.default_rng(seed).permutation(len(labels))
    training, out = [], []
    for rows in np.array_split(order, NUM_SITES):
        first = round(held_out * len(rows))
        for part, chosen in ((out, rows[:first]), (training, rows[first:])):
            part.append(Examples(features[chosen], labels[chosen], np.arange(len(chosen))))
    return training, out


def _scaled(text: str, centre: float, half: float) -> float:
    value = _number(text)
    return 0.0 if value is None else float(np.clip((value - centre) / half, -2, 2)) / 2


def _number(text: str) -> float | None:
    value = float(text) if text else MISSING
    return None if value == MISSING or np.isnan(value) else value
