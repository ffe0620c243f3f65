"""Occlusion for images: what the answer loses where a window of the picture is covered.

Zeiler and Fergus, ECCV 2014, section 2.1; the same as Captum's `Occlusion` with stride 1. It asks
the graph and needs no gradient, so that the adapter needs no torch. An image is a model whose
fields are its pixels, row by row: the request says how many rows and columns, as a signature's
fields are in one line.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import ModelSignature
from fedward.serving.explain import MEANING, Predict, contributions_json, to_log_odds
from fedward.serving.guard import MAX_ROWS
from fedward.serving.problems import Problem

_SIZE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})")


@dataclass(frozen=True, slots=True)
class Grid:
    """How fields lie in a picture.

    Attributes:
        rows: Of the picture.
        columns: Of the picture; what is left of the fields is channels, the last to change.
        window: Rows and columns that are covered at a time, in all channels.
    """

    rows: int
    columns: int
    window: tuple[int, int]


def parse_grid(grid: str, window: str, signature: ModelSignature) -> Grid:
    """Read `ROWSxCOLUMNS` of the picture and of the window. Raises `Problem` 422."""
    sizes = [_SIZE.fullmatch(text) for text in (grid, window)]
    if sizes[0] is None or sizes[1] is None:
        raise _wrong("grid" if sizes[0] is None else "window", "a size such as 8x8")
    (rows, columns), (high, wide) = [(int(s[1]), int(s[2])) for s in sizes if s is not None]
    if len(signature.fields) % (rows * columns):
        raise _wrong("grid", f"rows x columns that divide {len(signature.fields)} fields")
    if high > rows or wide > columns:
        raise _wrong("window", f"at most {rows}x{columns}")
    if (rows - high + 1) * (columns - wide + 1) > MAX_ROWS:
        raise _wrong("window", f"one that fits at most {MAX_ROWS} places")
    return Grid(rows, columns, (high, wide))


def occlude(
    predict: Predict,
    inputs: NDArray[np.float32],
    reference: NDArray[np.float32],
    grid: Grid,
) -> NDArray[np.float64]:
    """Log-odds that each field's windows take away when they are covered, on average.

    Args:
        predict: float32 `(n, fields)` to probabilities `(n, 1)`.
        inputs: float32, shape `(fields,)`.
        reference: float32, shape `(fields,)`: what covers.
        grid: How the fields lie.

    Returns:
        Shape `(fields,)`.
    """
    high, wide = grid.window
    shape = (grid.rows, grid.columns, -1)
    places = [(r, c) for r in range(grid.rows - high + 1) for c in range(grid.columns - wide + 1)]
    picture, cover = inputs.reshape(shape), reference.reshape(shape)
    covered = np.repeat(picture[None], len(places), axis=0)
    for one, (r, c) in zip(covered, places, strict=True):
        one[r : r + high, c : c + wide] = cover[r : r + high, c : c + wide]
    rows = np.concatenate([inputs[None], covered.reshape(len(places), -1)])
    scores = to_log_odds(predict(rows))
    lost, times = np.zeros(picture.shape), np.zeros(picture.shape)
    for loss, (r, c) in zip(scores[0] - scores[1:], places, strict=True):
        lost[r : r + high, c : c + wide] += loss
        times[r : r + high, c : c + wide] += 1
    return (lost / times).ravel()


def occlusion_json(
    signature: ModelSignature, contributions: NDArray[np.float64], grid: Grid
) -> dict[str, Any]:
    """As answered, the largest contribution first."""
    return {
        "method": "occlusion",
        "unit": "log-odds",
        "grid": [grid.rows, grid.columns],
        "window": list(grid.window),
        "contributions": contributions_json(signature, contributions),
        "meaning": f"{MEANING}; the mean over all windows with the pixel in them, each covered by "
        "the reference: it does not add up to the answer",
    }


def _wrong(field: str, allowed: str) -> Problem:
    return Problem(422, f"{field} must be {allowed}", field=field, allowed=allowed)
