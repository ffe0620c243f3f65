"""Histograms of a task's inputs and predictions: what a served model's patients are held against.

Bins come from the schema's public ranges, never from patients. A row adds one to exactly one cell
of each histogram, so that adding or removing it moves all of them together by the square root of
their number in L2 norm.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.tasks.schema import Field, Schema

PREDICTION = "prediction"


@dataclass(frozen=True, slots=True)
class Bins:
    """One histogram's bins.

    Attributes:
        name: The field, or `prediction`.
        edges: Rising, one more than bins; the outer bins reach to infinity.
        may_lack: Whether values may be missing: then one more cell counts them.
    """

    name: str
    edges: tuple[float, ...]
    may_lack: bool = True

    @property
    def cells(self) -> int:
        """Bins, and one for what is missing."""
        return len(self.edges) - 1 + self.may_lack

    def count(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """How many of `values` are in each cell, shape `(cells,)`."""
        known = values[~np.isnan(values)]
        where = np.searchsorted(np.array(self.edges[1:-1]), known, side="right")
        counts = np.bincount(where, minlength=len(self.edges) - 1).astype(np.float64)
        return np.append(counts, len(values) - len(known)) if self.may_lack else counts


Layout = tuple[Bins, ...]


def layout(schema: Schema, *, bins: int) -> Layout:
    """The histograms of a task: one a feature, in the schema's order, then the predictions.

    Args:
        schema: The task's.
        bins: Of a number, over its `scaling` range (what is beyond is in the outer ones), and of
            the prediction. A category has one for each code.
    """
    predictions = Bins(PREDICTION, _even(0.0, 1.0, bins), may_lack=False)
    return (*(Bins(f.name, _edges(f, bins)) for f in schema.features), predictions)


def size(histograms: Layout) -> int:
    """Cells of all histograms together."""
    return sum(one.cells for one in histograms)


def count(
    histograms: Layout,
    columns: Mapping[str, NDArray[np.float64]],
    predictions: NDArray[np.floating[Any]],
) -> NDArray[np.float64]:
    """All histograms of some rows, one after the other, shape `(size(histograms),)`.

    Args:
        histograms: As `layout` gives them.
        columns: By field, shape `(num_rows,)`, coded as in `Table`.
        predictions: Shape `(num_rows,)`, in [0, 1].
    """
    values = {**columns, PREDICTION: predictions}
    return np.concatenate([one.count(values[one.name]) for one in histograms])


def first_rows(patient_ids: Sequence[Hashable], *, most: int) -> list[int]:
    """The first `most` rows of each patient: more of them would weigh more than was charged."""
    seen: Counter[Hashable] = Counter()
    rows = []
    for row, patient in enumerate(patient_ids):
        seen[patient] += 1
        if seen[patient] <= most:
            rows.append(row)
    return rows


def monitor_json(
    histograms: Layout, counts: NDArray[np.float64], *, noise_std: float
) -> dict[str, Any] | None:
    """What `monitor.json` says of counts, which may carry noise.

    All histograms count the same rows, so their mean total is the best estimate of how many there
    are; each is then moved to the nearest one that has that total and no negative cell. Both are
    post-processing, and cost nothing.

    Args:
        histograms: As `layout` gives them.
        counts: Shape `(size(histograms),)`.
        noise_std: Standard deviation of the noise on each cell; 0 without noise.

    Returns:
        `format`, `fields` and `prediction`; None where noise left nothing to count.
    """
    ends = np.cumsum([one.cells for one in histograms])[:-1]
    parts = np.split(counts, ends)
    total = float(np.mean([part.sum() for part in parts]))
    if not total > max(1.0, noise_std):
        return None
    entries: dict[str, dict[str, Any]] = {}
    for one, part in zip(histograms, parts, strict=True):
        shares = nearest_shares(part / total)
        entries[one.name] = {
            "edges": list(one.edges),
            "shares": [round(float(share), 9) for share in shares[: len(one.edges) - 1]],
            "missing": round(float(shares[-1]), 9) if one.may_lack else 0.0,
            "noise": round(noise_std / total, 9),
        }
    return {
        "format": 1,
        "fields": {name: entry for name, entry in entries.items() if name != PREDICTION},
        PREDICTION: entries[PREDICTION],
    }


def nearest_shares(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest vector without negative elements that sums to 1.

    Duchi, Shalev-Shwartz, Singer and Chandra, ICML 2008, figure 1.
    """
    falling = np.sort(values)[::-1]
    excess = (np.cumsum(falling) - 1) / np.arange(1, values.size + 1)
    kept = int(np.flatnonzero(falling > excess)[-1])
    return np.asarray(np.maximum(values - excess[kept], 0.0), np.float64)


def _edges(field: Field, bins: int) -> tuple[float, ...]:
    match field.kind:
        case "category":
            return tuple(code - 0.5 for code in range(len(field.categories) + 1))
        case "flag":
            return (-0.5, 0.5, 1.5)
        case "number":
            return _even(*(field.scaling or (0.0, 1.0)), bins)


def _even(low: float, high: float, bins: int) -> tuple[float, ...]:
    return tuple(round(float(edge), 9) for edge in np.linspace(low, high, bins + 1))
