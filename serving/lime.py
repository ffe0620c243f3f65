"""LIME: a linear model around one patient, as an option beside Shapley values.

Ribeiro et al., KDD 2016, for tables: patients like this one are made up, the model is asked about
each, and a ridge regression weighted by likeness is fitted to its log-odds. What stands for the
population is the release's `monitor.json`, histograms made under differential privacy: no
patient's row is there to be drawn from. Drawn from a digest of the question, so that the same
question gets the same answer.

How well the line fits (R², weighted) is part of the answer: where it is low, the contributions
describe the line and not the model.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import Field, ModelSignature
from fedward.serving.drift import Histogram
from fedward.serving.explain import MEANING, Predict, contributions_json, to_log_odds
from fedward.serving.problems import Problem

SAMPLES = 2000
_RIDGE = 1.0  # as the authors' package has it
_KEPT = 0.5
_WIDTH = 0.75  # of the kernel, times the square root of the number of fields: theirs, too


@dataclass(frozen=True, slots=True)
class LocalLine:
    """What was found around one patient.

    Attributes:
        contributions: Log-odds by field, shape `(fields,)`: the line's slope times how far the
            patient is from the mean of the reference.
        reference: The line at the mean of the reference.
        log_odds: The model's at the patient.
        fit: R² of the line, weighted: 1 is a line, 0 says nothing.
    """

    contributions: NDArray[np.float64]
    reference: float
    log_odds: float
    fit: float


def explain_locally(
    predict: Predict,
    inputs: NDArray[np.float32],
    signature: ModelSignature,
    histograms: Mapping[str, Histogram],
    *,
    samples: int = SAMPLES,
) -> LocalLine:
    """A line around one patient.

    Args:
        predict: float32 `(n, fields)` to probabilities `(n, 1)`.
        inputs: float32, shape `(fields,)`; NaN is missing.
        signature: The model's interface.
        histograms: The release's reference by field.
        samples: How many patients are made up.

    Raises:
        Problem: 422, if a field has no reference.
    """
    lacks = [field.name for field in signature.fields if field.name not in histograms]
    if lacks:
        raise Problem(
            422,
            f"this release has no reference of {lacks[0]}, which LIME draws from; ask without "
            "method, or train with a [monitor] section",
            field="method",
            allowed="shapley",
        )
    label = f"{signature.model}/{signature.version}/{samples}/".encode()
    digest = hashlib.sha256(label + np.ascontiguousarray(inputs, "<f4").tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(digest))
    rows = np.repeat(inputs[None], samples + 1, axis=0)
    features = np.zeros((samples + 1, len(inputs)))
    away = np.zeros(len(inputs))
    for column, field in enumerate(signature.fields):
        histogram, value = histograms[field.name], inputs[column]
        # Half of the values stay the patient's: otherwise nobody is like them in many fields.
        drawn = np.where(rng.random(samples) < _KEPT, value, _draw(rng, field, histogram, samples))
        if field.kind == "number" and not np.isnan(value):
            drawn = np.where(np.isnan(drawn), value, drawn)
            mean, deviation = _moments(histogram)
            features[1:, column] = (drawn - value) / deviation
            away[column] = (value - mean) / deviation
        else:  # how unlike a category, or being missing, is
            same = _equal(drawn, value)
            features[1:, column] = same.astype(np.float64) - 1
            away[column] = 1 - _share(field, histogram, value)
        rows[1:, column] = drawn
    scores = to_log_odds(predict(rows.astype(np.float32)))
    distance = (features**2).sum(axis=1)
    weights = np.exp(-distance / (_WIDTH**2 * len(inputs)) / 2)
    slopes, intercept, fit = weighted_ridge(features, scores, weights, ridge=_RIDGE)
    contributions = slopes * away
    reference = intercept - float(contributions.sum())
    return LocalLine(contributions, reference, float(scores[0]), fit)


def weighted_ridge(
    features: NDArray[np.float64],
    scores: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    ridge: float,
) -> tuple[NDArray[np.float64], float, float]:
    """Slopes, intercept (which is not shrunk) and weighted R² of a ridge regression.

    Args:
        features: Shape `(n, fields)`.
        scores: Shape `(n,)`.
        weights: Shape `(n,)`, not negative.
        ridge: What is added to the diagonal, > 0.
    """
    total = weights.sum()
    middle, level = weights @ features / total, float(weights @ scores / total)
    centered, risen = features - middle, scores - level
    weighted = centered.T * weights
    normal = weighted @ centered + ridge * np.eye(features.shape[1])
    slopes = np.linalg.solve(normal, weighted @ risen)
    left = float(weights @ (risen - centered @ slopes) ** 2)
    spread = float(weights @ risen**2)
    return slopes, level - float(middle @ slopes), 1 - left / spread if spread > 0 else 1.0


def line_json(signature: ModelSignature, line: LocalLine) -> dict[str, Any]:
    """As answered, the largest contribution first."""
    return {
        "method": "lime",
        "unit": "log-odds",
        "reference": line.reference,
        "log_odds": line.log_odds,
        "r2": line.fit,
        "contributions": contributions_json(signature, line.contributions),
        "meaning": f"{MEANING}; of a line fitted around this patient, which explains as much of "
        "the model there as r2 says",
    }


def _draw(
    rng: np.random.Generator, field: Field, histogram: Histogram, count: int
) -> NDArray[np.float64]:
    """Values of a reference: codes, or numbers anywhere in their bin; NaN is missing."""
    whole = np.maximum(histogram.whole, 0.0)
    bins = rng.choice(len(whole), size=count, p=whole / whole.sum())
    missing = bins == len(histogram.shares)
    bins = np.where(missing, 0, bins)
    if field.kind == "number":
        low, high = histogram.edges[bins], histogram.edges[bins + 1]
        values = low + (high - low) * rng.random(count)
    else:
        codes = np.array(sorted(field.codes.values()), np.float64)
        values = codes[np.minimum(bins, len(codes) - 1)]
    return np.where(missing, np.nan, values)


def _moments(histogram: Histogram) -> tuple[float, float]:
    """Mean and standard deviation of what is known, spread evenly over each bin."""
    shares = histogram.shares / max(histogram.shares.sum(), 1e-12)
    middles = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    widths = np.diff(histogram.edges)
    mean = float(shares @ middles)
    variance = float(shares @ ((middles - mean) ** 2 + widths**2 / 12))
    return mean, max(variance, 1e-12) ** 0.5


def _equal(drawn: NDArray[np.float64], value: np.float32) -> NDArray[np.bool_]:
    return np.isnan(drawn) if np.isnan(value) else drawn == value


def _share(field: Field, histogram: Histogram, value: np.float32) -> float:
    """How much of the reference is as the patient."""
    if np.isnan(value):
        return histogram.missing
    codes = sorted(field.codes.values())
    place = codes.index(float(value))
    return float(histogram.shares[place]) if place < len(histogram.shares) else 0.0
