"""Metrics of a binary task from counts, which add up over sites.

The bins are fine enough for an exact AUC, and so a small site's own histogram nearly shows its
patients' probabilities: send it through the secure sum, or with noise, wherever that matters.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.tasks.reference import nearest_shares

# Bins of equal width in log-odds, not in probability: rare outcomes crowd near 0, and a
# difference from .001 to .002 ranks patients as much as one from .3 to .46.
_NUM_BINS = 4096
_LARGEST_LOG_ODDS = 10.24

_COARSE_BINS = 20
_NAMES = ("histogram", "num_examples", "correct", "squared_error", "log_loss")


def binary_sums(
    probabilities: NDArray[np.floating], labels: NDArray[np.floating | np.integer]
) -> dict[str, NDArray[np.float64]]:
    """What a site counts on its held-out patients.

    Args:
        probabilities: Shape `(num_examples,)`, in [0, 1].
        labels: Shape `(num_examples,)`, 0 or 1.

    Returns:
        `histogram` of shape `(2, 4096)`: number of examples by class and by log-odds;
        `num_examples`, `correct` (at threshold .5), `squared_error` and `log_loss` of shape `()`.

    Raises:
        ValueError: The shapes differ, a probability is outside [0, 1] or a label not 0 or 1.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    y = np.asarray(labels, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape:
        raise ValueError(f"probabilities of shape {p.shape}, labels of shape {y.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities must be within [0, 1]")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    limit = 1 / (1 + np.exp(_LARGEST_LOG_ODDS))
    inside = np.clip(p, limit, 1 - limit)
    log_odds = np.log(inside) - np.log1p(-inside)
    bins = ((log_odds / _LARGEST_LOG_ODDS + 1) * (_NUM_BINS / 2)).astype(np.int64)
    bins = np.clip(bins, 0, _NUM_BINS - 1)
    histogram = np.stack(
        [np.bincount(bins[y == label], minlength=_NUM_BINS) for label in (0, 1)]
    ).astype(np.float64)
    chance = np.where(y == 1, inside, 1 - inside)
    return {
        "histogram": histogram,
        "num_examples": np.asarray(float(len(y))),
        "correct": np.asarray(float(((p >= 0.5) == (y == 1)).sum())),  # noqa: PLR2004 (even odds)
        "squared_error": np.asarray(float(((p - y) ** 2).sum())),
        "log_loss": np.asarray(float(-np.log(chance).sum())),
    }


def summarise_binary(sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """Metrics of `binary_sums`, of one site or added over sites.

    Returns:
        `num_examples`; with at least one example also `accuracy`, `brier`, `log_loss` and
        `prevalence`; with both classes also `auroc`. What is not defined is not there.

    Raises:
        ValueError: An array is missing or does not have its shape.
    """
    missing = [name for name in _NAMES if name not in sums]
    if missing:
        raise ValueError(f"sums lack {', '.join(missing)}")
    histogram = np.asarray(sums["histogram"], dtype=np.float64)
    if histogram.shape != (2, _NUM_BINS):
        raise ValueError(f"histogram has shape {histogram.shape}, not {(2, _NUM_BINS)}")
    num_examples = float(sums["num_examples"])
    summary = {"num_examples": num_examples}
    if num_examples > 0:
        summary |= {
            "accuracy": float(sums["correct"]) / num_examples,
            "brier": float(sums["squared_error"]) / num_examples,
            "log_loss": float(sums["log_loss"]) / num_examples,
            "prevalence": float(histogram[1].sum()) / num_examples,
        }
    auroc = _auroc(histogram)
    return summary if auroc is None else summary | {"auroc": auroc}


def coarse_histogram(sums: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The part of `binary_sums` that is released under privacy.

    Each example adds one to one cell, so that adding or removing it moves the array by exactly 1
    in L2 norm. Few cells, so that noise on each leaves the metrics readable.

    Returns:
        `histogram` of shape `(2, 20)`: number of examples by class and probability.
    """
    chances = _bin_chances()
    cells = np.minimum((chances * _COARSE_BINS).astype(np.int64), _COARSE_BINS - 1)
    coarse = np.zeros((2, _COARSE_BINS))
    for label in (0, 1):
        np.add.at(coarse[label], cells, np.asarray(sums["histogram"])[label])
    return {"histogram": coarse}


def summarise_coarse(sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """Metrics of a `coarse_histogram`, which may carry noise.

    Negative cells become empty, and the others less by as much, so that the number of examples
    stays what was counted. Returns what `summarise_binary` does, less `log_loss`; accuracy
    and Brier score are as if every example lay in the middle of its cell.

    Raises:
        ValueError: The histogram does not have its shape.
    """
    histogram = _without_negative(np.asarray(sums["histogram"], dtype=np.float64))
    total = float(histogram.sum())
    summary = {"num_examples": total}
    if total > 0:
        middle = (np.arange(_COARSE_BINS) + 0.5) / _COARSE_BINS
        half = _COARSE_BINS // 2
        correct = histogram[0, :half].sum() + histogram[1, half:].sum()
        squared = (histogram[0] * middle**2 + histogram[1] * (1 - middle) ** 2).sum()
        summary |= {
            "accuracy": float(correct) / total,
            "brier": float(squared) / total,
            "prevalence": float(histogram[1].sum()) / total,
        }
    auroc = _auroc(histogram)
    return summary if auroc is None else summary | {"auroc": auroc}


def calibration_of(sums: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Calibration of a `coarse_histogram`, which may carry noise.

    Returns:
        `bins`: ten, each with `low`, `high`, `num_examples`, and where there are any `predicted`
        (their mean probability, as if each lay in the middle of its cell) and `observed` (the
        share with the outcome); and `ece`, the mean of the distance of the two weighted by
        examples (expected calibration error; Naeini et al., AAAI 2015), if there are any at all.

    Raises:
        ValueError: The histogram does not have its shape.
    """
    histogram = _without_negative(np.asarray(sums["histogram"], dtype=np.float64))
    middles = (np.arange(_COARSE_BINS) + 0.5) / _COARSE_BINS
    pairs = histogram.reshape(2, -1, 2)
    middles_of_pairs = middles.reshape(-1, 2)
    bins: list[dict[str, float]] = []
    distance = 0.0
    for number, chances in enumerate(middles_of_pairs):
        cells = pairs[:, number]
        count = float(cells.sum())
        edges = {
            "low": number / len(middles_of_pairs),
            "high": (number + 1) / len(middles_of_pairs),
        }
        entry = {**edges, "num_examples": count}
        if count > 0:
            predicted = float((cells.sum(axis=0) * chances).sum() / count)
            observed = float(cells[1].sum() / count)
            entry |= {"predicted": predicted, "observed": observed}
            distance += count * abs(predicted - observed)
        bins.append(entry)
    total = float(histogram.sum())
    return {"bins": bins, "ece": distance / total} if total > 0 else {"bins": bins}


def _without_negative(histogram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest histogram of the same total without negative cells.

    To cut them at zero instead would add noise's positive half: to forty cells, more than a
    small group has patients.
    """
    if histogram.shape != (2, _COARSE_BINS):
        raise ValueError(f"histogram has shape {histogram.shape}, not {(2, _COARSE_BINS)}")
    total = float(histogram.sum())
    if total <= 0:
        return np.zeros_like(histogram)
    if (histogram >= 0).all():
        return histogram
    return (nearest_shares(histogram.ravel() / total) * total).reshape(histogram.shape)


def _bin_chances() -> NDArray[np.float64]:
    centres = ((np.arange(_NUM_BINS) + 0.5) / (_NUM_BINS / 2) - 1) * _LARGEST_LOG_ODDS
    return np.asarray(1 / (1 + np.exp(-centres)), dtype=np.float64)


def _auroc(histogram: NDArray[np.float64]) -> float | None:
    negative, positive = histogram
    pairs = negative.sum() * positive.sum()
    if pairs <= 0:
        return None
    # Mann and Whitney: the share of pairs in the right order; a tie counts half.
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs)
