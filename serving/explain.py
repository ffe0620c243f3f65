"""Which values contributed to an answer: Shapley values over the model's graph.

Permutation sampling with antithetic pairs (Mitchell et al., JMLR 23:43, 2022): every pair of a
permutation and its reverse is one pass over the fields, all passes are one batch. Contributions
are in log-odds, where a logistic model adds up field by field: for it a single permutation is
exact. They sum to the answer's log-odds minus the reference's, by construction.

The reference is no patient: it is the middle of the release's private histograms, or, without
them, a patient of whom nothing is known but the required fields, at the middle of their range.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import Field, ModelSignature
from fedward.serving.drift import Histogram

_PAIRS = 8
_SEED = 7  # the same question gets the same answer
MEANING = (
    "how much each value moved this answer, compared with a patient at the reference; "
    "a contribution, not a cause"
)
_CLOSEST = 1e-7  # of a float32 probability to 0 or 1

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Contributions to one answer.

    Attributes:
        contributions: Log-odds by field, shape `(fields,)`.
        reference: Log-odds of the reference.
        log_odds: Log-odds of the answer: the reference plus all contributions.
    """

    contributions: NDArray[np.float64]
    reference: float
    log_odds: float


def reference_input(
    signature: ModelSignature, histograms: Mapping[str, Histogram]
) -> NDArray[np.float32]:
    """The input that contributions are relative to, float32 `(fields,)`; NaN is missing."""
    return np.array([_typical(f, histograms.get(f.name)) for f in signature.fields], np.float32)


def explain(
    predict: Predict, inputs: NDArray[np.float32], reference: NDArray[np.float32]
) -> Explanation:
    """Shapley values of one input.

    Args:
        predict: float32 `(n, fields)` to probabilities `(n, 1)`.
        inputs: float32, shape `(fields,)`.
        reference: float32, shape `(fields,)`.
    """
    count = len(inputs)
    rng = np.random.default_rng(_SEED)
    half = [rng.permutation(count) for _ in range(_PAIRS)]
    orders = np.array([order for one in half for order in (one, one[::-1])])
    # Row k of a pass has the first k fields of its order from the input, the rest from the
    # reference: ranks say at which step a field changes over.
    ranks = np.argsort(orders, axis=1)
    steps = np.arange(count + 1)
    mixed = np.where(ranks[:, None, :] < steps[None, :, None], inputs, reference)
    scores = to_log_odds(predict(mixed.reshape(-1, count).astype(np.float32)))
    scores = scores.reshape(len(orders), count + 1)
    gains = np.diff(scores, axis=1)
    contributions = np.take_along_axis(gains, ranks, axis=1).mean(axis=0)
    return Explanation(contributions, float(scores[0, 0]), float(scores[0, -1]))


def explanation_json(signature: ModelSignature, explanation: Explanation) -> dict[str, Any]:
    """As answered, the largest contribution first."""
    return {
        "method": "shapley",
        "unit": "log-odds",
        "reference": explanation.reference,
        "log_odds": explanation.log_odds,
        "contributions": contributions_json(signature, explanation.contributions),
        "meaning": MEANING,
    }


def contributions_json(
    signature: ModelSignature, contributions: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """By field, the largest first."""
    return [
        {"field": signature.fields[i].name, "contribution": float(contributions[i])}
        for i in np.argsort(-np.abs(contributions))
    ]


def _typical(field: Field, histogram: Histogram | None) -> float:
    if histogram is not None and field.kind == "number":
        return histogram.middle()
    if histogram is not None and histogram.shares.sum() > 0:
        return sorted(field.codes.values())[int(histogram.shares.argmax())]
    if not field.required:
        return float("nan")
    if field.kind == "number" and field.low is not None and field.high is not None:
        return (field.low + field.high) / 2
    return min(field.codes.values(), default=0.0)


def to_log_odds(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-odds of shape `(n,)` from probabilities `(n, 1)`; finite."""
    p = np.clip(probabilities[:, 0].astype(np.float64), _CLOSEST, 1 - _CLOSEST)
    return np.log(p / (1 - p))
