"""Units in which a value may also be given, and how each turns into the model's own."""

from collections.abc import Mapping

_MG_PER_DL = "mg/dl"

# For any field in this unit: name to (factor, offset).
_GENERAL: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "mm[Hg]": {"mmHg": (1.0, 0.0), "kPa": (7.50062, 0.0)},
    "a": {"years": (1.0, 0.0), "mo": (1 / 12, 0.0)},
    _MG_PER_DL: {"g/L": (100.0, 0.0), "mg/L": (0.1, 0.0)},
    "Cel": {"[degF]": (5 / 9, -160 / 9), "K": (1.0, -273.15)},
    "cm": {"m": (100.0, 0.0), "[in_i]": (2.54, 0.0), "mm": (0.1, 0.0)},
    "kg": {"g": (0.001, 0.0), "[lb_av]": (0.45359237, 0.0)},
    "/min": {"bpm": (1.0, 0.0)},
}

# Molar mass in g/mol by LOINC code of the mass concentration: a mole of each weighs another.
_MOLAR_MASS: Mapping[str, float] = {
    "2093-3": 386.65,  # cholesterol
    "2345-7": 180.16,  # glucose
    "2160-0": 113.12,  # creatinine
    "3094-0": 28.014,  # nitrogen of urea
    "1975-2": 584.66,  # bilirubin
}


def conversions(unit: str, loinc: str | None) -> dict[str, tuple[float, float]]:
    """Other units of a field: name to (factor, offset); value * factor + offset gives `unit`."""
    own = _MG_PER_DL if unit.lower() == _MG_PER_DL else unit
    found = dict(_GENERAL.get(own, {}))
    if own == _MG_PER_DL and loinc is not None and loinc in _MOLAR_MASS:
        mg_per_dl = _MOLAR_MASS[loinc] / 10  # of 1 mmol/L
        found["mmol/L"] = (mg_per_dl, 0.0)
        found["umol/L"] = (mg_per_dl / 1000, 0.0)
    return found
