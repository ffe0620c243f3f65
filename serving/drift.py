"""Drift: do today's patients look like those that the model was made for?

The reference is the release's `monitor.json`: histograms made under differential privacy when the
model was trained. Today's values are kept in a bounded window in memory and never written.

`monitor.json`::

    {"format": 1,
     "fields": {"age": {"edges": [18, 35, ...], "shares": [.1, ...], "missing": 0.0}, ...},
     "prediction": {"edges": [0, .1, ..., 1], "shares": [...], "missing": 0}}

`noise`, if it is there, is the standard deviation of each share's noise; the index is smoothed by
it, and an alarm has to be above what the noise alone makes.

A category's edges are its codes' midpoints. Population stability index: Siddiqi, Credit Risk
Scorecards (2006), section 9; above 0.2 is taken as a shift worth a look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import ModelSignature

WINDOW = 2048
ALARM_PSI = 0.2
# With fewer rows the index is mostly sampling noise: its mean is about bins / rows.
LEAST_ROWS = 200
_SMOOTHING = 1e-4
_GROUP = 64  # requests whose values are copied into the window together
PREDICTION = "prediction"


@dataclass(frozen=True, slots=True)
class Histogram:
    """A reference distribution.

    Attributes:
        edges: Shape `(k + 1,)`, rising; the outer bins reach to infinity.
        shares: Shape `(k,)`, summing to 1 - missing.
        missing: Share of missing values.
        noise: Standard deviation of the noise on each share.
    """

    edges: NDArray[np.float64]
    shares: NDArray[np.float64]
    missing: float
    noise: float = 0.0

    @property
    def stability_of_noise(self) -> float:
        """The population stability index that the reference's own noise is expected to make.

        To second order it is the sum of squared differences over the shares.
        """
        return float((self.noise**2 / (self.whole + self.noise + _SMOOTHING)).sum())

    def count(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """How many of `values` are in each bin, and last how many are missing: `(k + 1,)`."""
        known = values[~np.isnan(values)]
        bins = np.searchsorted(self.edges[1:-1], known, side="right")
        counts = np.bincount(bins, minlength=len(self.shares)).astype(np.float64)
        return np.append(counts, len(values) - len(known))

    @property
    def whole(self) -> NDArray[np.float64]:
        """Shares with the missing ones last, shape `(k + 1,)`."""
        return np.append(self.shares, self.missing)

    def middle(self) -> float:
        """The mean of the reference by the bins' midpoints; NaN if nothing was known."""
        weight = self.shares.sum()
        if weight <= 0:
            return float("nan")
        middles = (self.edges[1:] + self.edges[:-1]) / 2
        return float((middles * self.shares).sum() / weight)


@dataclass(frozen=True, slots=True)
class Shift:
    """How far one field, or the prediction, is from its reference.

    Attributes:
        name: The field, or `prediction`.
        psi: Population stability index over the bins, missing values being one.
        ks: Kolmogorov-Smirnov distance at the bins' edges, of the known values.
        rows: How many values it is from.
        alarm: Whether it is worth a look.
    """

    name: str
    psi: float
    ks: float
    rows: int
    alarm: bool


def parse_monitor(value: Mapping[str, Any]) -> dict[str, Histogram]:
    """Read `monitor.json`'s value. Raises `ValueError`, saying what is wrong."""
    if value.get("format") != 1:
        raise ValueError("monitor.json: format is not 1")
    entries = {**value.get("fields", {}), PREDICTION: value.get(PREDICTION)}
    histograms: dict[str, Histogram] = {}
    for name, entry in entries.items():
        try:
            edges = np.array(entry["edges"], np.float64)
            shares = np.array(entry["shares"], np.float64)
            missing, noise = float(entry["missing"]), float(entry.get("noise", 0.0))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"monitor.json: {name} is malformed") from error
        whole = np.append(shares, missing)
        if (
            edges.shape != (len(shares) + 1,)
            or not (np.diff(edges) > 0).all()
            or not (whole >= 0).all()
            or abs(whole.sum() - 1) > 1e-6  # noqa: PLR2004 (rounding)
            or not 0 <= noise < np.inf
        ):
            raise ValueError(f"monitor.json: {name} is no histogram")
        histograms[name] = Histogram(edges, shares, missing, noise)
    return histograms


def population_stability(
    now: NDArray[np.float64], reference: NDArray[np.float64], *, noise: float = 0.0
) -> float:
    """PSI of two histograms over the same bins; counts or shares, smoothed where empty.

    With `noise` on the reference's shares they are smoothed by it: in a cell that is mostly noise
    nothing can be said of a ratio.
    """
    smoothing = max(_SMOOTHING, noise)
    a = now / max(now.sum(), 1e-12) + smoothing
    b = reference / max(reference.sum(), 1e-12) + smoothing
    a, b = a / a.sum(), b / b.sum()
    return float(((a - b) * np.log(a / b)).sum())


def kolmogorov_smirnov(now: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """The largest distance of two cumulative distributions at the edges of their bins."""
    if not now.sum() or not reference.sum():
        return 0.0
    return float(np.abs(np.cumsum(now) / now.sum() - np.cumsum(reference) / reference.sum()).max())


class DriftMonitor:
    """The last rows of one served version, against its reference.

    Args:
        signature: The model's interface.
        reference: `parse_monitor`'s result; empty if the release has none.
    """

    def __init__(self, signature: ModelSignature, reference: Mapping[str, Histogram]) -> None:
        self._names = [field.name for field in signature.fields]
        self._reference = dict(reference)
        self._rows = np.empty((WINDOW, len(self._names) + 1), np.float32)
        self._next = self._seen = 0
        self._waiting: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        self._single: list[tuple[float | None, ...]] = []

    def see(self, inputs: NDArray[np.float32], outputs: NDArray[np.float32]) -> None:
        """Add a batch to the window; keeps both arrays, which must not change."""
        if not self._reference:
            return
        self._waiting.append((inputs, outputs))
        if len(self._waiting) >= _GROUP or len(inputs) >= _GROUP:
            self._gather()

    def see_row(self, row: Sequence[float | None], outputs: Sequence[float]) -> None:
        """Add one row; keeps both, which must not change."""
        if not self._reference:
            return
        self._single.append((*row, outputs[0]))
        if len(self._single) >= _GROUP:
            self._gather()

    def _gather(self) -> None:
        """Copy what waits into the window: once for many requests, as a copy costs little."""
        if self._single:
            rows = np.array(self._single, np.float32)  # None becomes NaN
            self._single.clear()
            self._waiting.append((rows[:, :-1], rows[:, -1:]))
        if not self._waiting:
            return
        inputs = np.concatenate([one for one, _ in self._waiting])[-WINDOW:]
        outputs = np.concatenate([other for _, other in self._waiting])[-WINDOW:]
        self._waiting.clear()
        where = np.arange(self._next, self._next + len(inputs)) % WINDOW
        self._rows[where, :-1] = inputs
        self._rows[where, -1] = outputs[:, 0]
        self._next = (self._next + len(inputs)) % WINDOW
        self._seen += len(inputs)

    def shifts(self) -> list[Shift]:
        """Every field's and the prediction's shift, the largest first."""
        self._gather()
        rows = min(self._seen, WINDOW)
        found = []
        for column, name in enumerate([*self._names, PREDICTION]):
            reference = self._reference.get(name)
            if reference is None or not rows:
                continue
            now = reference.count(self._rows[:rows, column])
            psi = population_stability(now, reference.whole, noise=reference.noise)
            alarm = psi > ALARM_PSI + reference.stability_of_noise and rows >= LEAST_ROWS
            ks = kolmogorov_smirnov(now[:-1], reference.shares)
            found.append(Shift(name, psi, ks, rows, alarm))
        return sorted(found, key=lambda shift: -shift.psi)
