"""What no patient can have is refused, in every protocol alike."""

import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import ModelSignature
from fedward.serving.problems import Problem

MAX_ROWS = 4096
_MATRIX = 2


class Guard:
    """Checks raw clinical values against a model's signature."""

    def __init__(self, signature: ModelSignature) -> None:
        self._fields = signature.fields
        fields = signature.fields
        # Compared in float32, as the values arrive: rounding is monotone, so that what is inside
        # the range before rounding is inside the rounded range.
        self._low = np.array([-np.inf if f.low is None else f.low for f in fields], np.float32)
        self._high = np.array([np.inf if f.high is None else f.high for f in fields], np.float32)
        codes: list[tuple[int, NDArray[np.float32]]] = []
        for column, field in enumerate(fields):
            values = sorted(field.codes.values())
            if values:
                self._low[column], self._high[column] = values[0], values[-1]
                codes.append((column, np.array(values, np.float32)))
        self._codes = codes
        self._required = np.array([f.required for f in fields])
        self._any_required = bool(self._required.any())

    def check(self, inputs: NDArray[np.float32]) -> None:
        """Check a batch.

        Args:
            inputs: float32, shape `(n, fields)`; NaN is missing.

        Raises:
            Problem: 400 for a wrong shape; 413 for too many rows; 422 for a value that is not
                allowed or a required one that is missing, naming row, field and what is allowed.
        """
        width = len(self._fields)
        if inputs.ndim != _MATRIX or inputs.shape[1] != width or not len(inputs):
            raise Problem(
                400, f"the input's shape is {list(inputs.shape)} and must be [n, {width}], n >= 1"
            )
        if len(inputs) > MAX_ROWS:
            raise Problem(413, f"{len(inputs)} rows; at most {MAX_ROWS} in one request")
        wrong = (inputs < self._low) | (inputs > self._high) | np.isinf(inputs)
        for column, codes in self._codes:
            values = inputs[:, column]
            wrong[:, column] |= ~(np.isin(values, codes) | np.isnan(values))
        if self._any_required:
            wrong |= np.isnan(inputs) & self._required
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            field = self._fields[column]
            missing = bool(np.isnan(inputs[row, column]))
            raise Problem(
                422,
                f"{field.name} {'is missing' if missing else 'is not allowed'}; "
                f"allowed: {field.allowed()}",
                field=field.name,
                allowed=field.allowed(),
                row=row,
            )
