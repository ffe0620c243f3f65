"""From clinical values to a model's features, as data: NumPy runs it, and so does ONNX.

Three kinds of feature, in this order:

1. a number, cut to its range and mapped linearly, so that [low, high] becomes [-1, 1]; missing
   is 0, the middle of the range;
2. for each field that may be missing, 1 if it is;
3. for each category, 1 if it is that one; missing is none of them. A flag, and a category with
   two values, is -1 or 1, and missing is 0.

All are then multiplied by one `gain`. Everything is bounded, so that the norm of a patient's
gradient is too, and clipping under privacy cuts few.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.tasks.schema import Field, Schema

_FORMAT = 1
# Standardised numbers are cut this many standard deviations from the mean: an outlier then moves
# a model as a rare value does, and the features stay bounded.
_CUT = 4.0


@dataclass(frozen=True, slots=True)
class Scaled:
    """One number's way to a feature: `(clip(x, low, high) - center) * scale`, missing is 0."""

    column: int
    low: float
    high: float
    center: float
    scale: float


@dataclass(frozen=True, slots=True)
class Preparation:
    """The whole way from raw columns to features.

    Columns are numbered in the order of the schema's features.

    Attributes:
        num_columns: Number of raw columns.
        scaled: Numbers.
        signed: Columns whose codes 0 and 1 become -1 and 1; missing is 0.
        missing: Columns with an indicator of being missing.
        equals: Column and code of each indicator of a category.
        gain: Multiplies every feature.
        names: Of the features, in order.
    """

    num_columns: int
    scaled: tuple[Scaled, ...]
    signed: tuple[int, ...]
    missing: tuple[int, ...]
    equals: tuple[tuple[int, float], ...]
    gain: float
    names: tuple[str, ...]

    @property
    def num_features(self) -> int:
        """Length of a feature vector."""
        return len(self.scaled) + len(self.signed) + len(self.missing) + len(self.equals)

    def apply(self, raw: NDArray[np.float64]) -> NDArray[np.float32]:
        """Features of shape `(num_rows, num_features)` from raw columns side by side.

        Raises:
            ValueError: `raw` does not have `num_columns` columns.
        """
        if raw.ndim != 2 or raw.shape[1] != self.num_columns:  # noqa: PLR2004 (a matrix)
            raise ValueError(f"raw has shape {raw.shape}, not (rows, {self.num_columns})")
        features = [
            (np.clip(raw[:, s.column], s.low, s.high) - s.center) * s.scale for s in self.scaled
        ]
        features += [2 * raw[:, column] - 1 for column in self.signed]
        features += [np.isnan(raw[:, column]).astype(np.float64) for column in self.missing]
        features += [(raw[:, column] == code).astype(np.float64) for column, code in self.equals]
        stacked = np.stack(features, axis=1) * self.gain
        return np.nan_to_num(stacked, nan=0.0).astype(np.float32)


def preparation(schema: Schema, fitted: Mapping[str, Any] | None, *, gain: float) -> Preparation:
    """The preparation of a schema.

    Args:
        schema: Its features' kinds, ranges and categories.
        fitted: From `fit`, or None for the schema's public scaling ranges.
        gain: Multiplies every feature.

    Raises:
        ValueError: `fitted` is not of this schema, or of an unknown format.
    """
    numbers = _numbers(schema)
    scales = _public(numbers) if fitted is None else _read(fitted, numbers)
    columns = {f.name: index for index, f in enumerate(schema.features)}
    signed = [f for f in schema.features if _is_signed(f)]
    missing = [f for f in schema.features if f.missing_indicator]
    equals = [
        (f, code) for f in schema.features if f.kind == "category" and not _is_signed(f)
        for code in range(len(f.categories))
    ]  # fmt: skip
    return Preparation(
        num_columns=len(schema.features),
        scaled=tuple(Scaled(columns[f.name], *scales[f.name]) for f in numbers),
        signed=tuple(columns[f.name] for f in signed),
        missing=tuple(columns[f.name] for f in missing),
        equals=tuple((columns[f.name], float(code)) for f, code in equals),
        gain=gain,
        names=(
            *(f.name for f in numbers),
            *(f.name for f in signed),
            *(f"{f.name} missing" for f in missing),
            *(f"{f.name} = {f.categories[code]}" for f, code in equals),
        ),
    )


def statistics(
    schema: Schema, columns: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    """Sums over rows of each number, on the scale where its public range is [-1, 1].

    Returns:
        `count`, `sum`, `sum_of_squares` and `missing`, each of shape `(number of numbers,)`, in
        the schema's order. On that scale the variance does not drown in the mean's square.
    """
    count, total, squares, missing = [], [], [], []
    for f in _numbers(schema):
        _, _, center, scale = _public([f])[f.name]
        values = columns[f.name]
        known = (values[~np.isnan(values)] - center) * scale
        count.append(len(known))
        total.append(known.sum())
        squares.append((known**2).sum())
        missing.append(np.isnan(values).sum())
    return {
        "count": np.array(count, dtype=np.float64),
        "sum": np.array(total, dtype=np.float64),
        "sum_of_squares": np.array(squares, dtype=np.float64),
        "missing": np.array(missing, dtype=np.float64),
    }


def fit(schema: Schema, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Mean and standard deviation of each number from `statistics`, added over sites.

    Two standard deviations become 1, as the span between the ends of a scaling range would. A
    number that was never measured, or never differs, keeps its public range.

    Raises:
        ValueError: An array is missing or misshapen, or the sums are no patients' sums.
    """
    numbers = _numbers(schema)
    shape = (len(numbers),)
    for name in ("count", "sum", "sum_of_squares", "missing"):
        if name not in sums or np.shape(sums[name]) != shape or not np.isfinite(sums[name]).all():
            raise ValueError(f"sums need {name}: finite numbers of shape {shape}")
    fitted: dict[str, list[float]] = {}
    for index, f in enumerate(numbers):
        low, high, center, scale = _public([f])[f.name]
        count, total = float(sums["count"][index]), float(sums["sum"][index])
        mean = total / count if count > 0 else 0.0
        variance = float(sums["sum_of_squares"][index]) / count - mean**2 if count > 0 else 0.0
        if variance < -1e-9 * max(1.0, mean**2):
            raise ValueError(f"the sums of {f.name} have a negative variance")
        if variance <= 1e-12:  # noqa: PLR2004 (rounding of a constant)
            fitted[f.name] = [low, high, center, scale]
            continue
        deviation = variance**0.5 / scale
        middle = center + mean / scale
        fitted[f.name] = [
            middle - _CUT * deviation, middle + _CUT * deviation, middle, 0.5 / deviation,
        ]  # fmt: skip
    return {"format": _FORMAT, "scaling": "standardised", "numbers": fitted}


def _numbers(schema: Schema) -> list[Field]:
    return [f for f in schema.features if f.kind == "number"]


def _is_signed(f: Field) -> bool:
    return f.kind == "flag" or len(f.categories) == 2  # noqa: PLR2004 (yes and no)


def _public(numbers: list[Field]) -> dict[str, tuple[float, float, float, float]]:
    scales = {}
    for f in numbers:
        if f.scaling is None:
            raise ValueError(f"{f.name} has no scaling range")
        low, high = f.scaling
        scales[f.name] = (low, high, (low + high) / 2, 2 / (high - low))
    return scales


def _read(
    fitted: Mapping[str, Any], numbers: list[Field]
) -> dict[str, tuple[float, float, float, float]]:
    if fitted.get("format") != _FORMAT or fitted.get("scaling") != "standardised":
        raise ValueError("the fitted preparation has an unknown format")
    values = fitted.get("numbers")
    if not isinstance(values, Mapping) or set(values) != {f.name for f in numbers}:
        raise ValueError("the fitted preparation is of another schema")
    scales = {}
    for name, row in values.items():
        if not isinstance(row, Sequence) or len(row) != 4:  # noqa: PLR2004 (as `fit` wrote)
            raise ValueError(f"the fitted preparation of {name} is not a scale")
        low, high, center, scale = (float(v) for v in row)
        if not (low < high and scale > 0 and np.isfinite([low, high, center, scale]).all()):
            raise ValueError(f"the fitted preparation of {name} is not a scale")
        scales[name] = (low, high, center, scale)
    return scales
