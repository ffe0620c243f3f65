"""Losses that know their own derivative, one value an example.

A linear model's step without privacy spends half of its time in autograd; with privacy nothing
but the derivative of the loss by the outputs is needed of it, and that is a line of arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

OutputGradient = Callable[[NDArray[np.float32], NDArray[Any]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class DifferentiatedLoss:
    """A loss and its derivative.

    Attributes:
        values: Of outputs and labels, one value an example, for autograd.
        output_gradient: Of outputs and labels as arrays, the gradient of the summed values by the
            outputs, as a new array. May overflow where an output is large: whoever calls it has
            NumPy's warnings turned off.
    """

    values: "Callable[[Tensor, Tensor], Tensor]"
    output_gradient: OutputGradient

    def __call__(self, outputs: "Tensor", labels: "Tensor") -> "Tensor":
        """One value an example."""
        return self.values(outputs, labels)


def _cross_entropy(outputs: "Tensor", labels: "Tensor") -> "Tensor":
    from torch.nn.functional import cross_entropy as values

    return values(outputs, labels, reduction="none")


def _softmax_less_label(
    outputs: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.float32]:
    classes = outputs.shape[1]
    if classes == 2:  # noqa: PLR2004 (a logistic regression's step is little more than this)
        if np.bitwise_or.reduce(labels) not in (0, 1):
            raise IndexError("a class number is 0 or 1")
        second = _logistic(outputs[:, 1] - outputs[:, 0])
        second -= labels.astype(np.float32)
        both: NDArray[np.float32] = second[:, None] * _BOTH
        return both
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        raise IndexError(f"a class number is 0 to {classes - 1}")
    d: NDArray[np.float32] = outputs - outputs.max(1, keepdims=True)
    np.exp(d, out=d)
    d /= d.sum(1, keepdims=True)
    d[np.arange(len(d)), labels] -= 1
    return d


def _logistic(log_odds: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / (1 + exp(-log_odds)), in place: 1 / (1 + inf) is 0, and NaN stays."""
    np.negative(log_odds, out=log_odds)
    np.exp(log_odds, out=log_odds)
    log_odds += 1
    return np.reciprocal(log_odds, out=log_odds)


_BOTH = np.array([[-1, 1]], dtype=np.float32)


def _binary_cross_entropy(outputs: "Tensor", labels: "Tensor") -> "Tensor":
    from torch.nn.functional import binary_cross_entropy_with_logits as values

    return values(outputs.reshape(-1), labels.to(outputs.dtype), reduction="none")


def _probability_less_label(
    outputs: NDArray[np.float32], labels: NDArray[Any]
) -> NDArray[np.float32]:
    d = _logistic(outputs.copy())
    d -= labels.reshape(d.shape).astype(np.float32, copy=False)
    return d


cross_entropy = DifferentiatedLoss(_cross_entropy, _softmax_less_label)
"""Of outputs `(num_examples, classes)` and labels as class numbers."""

binary_cross_entropy = DifferentiatedLoss(_binary_cross_entropy, _probability_less_label)
"""Of log-odds `(num_examples, 1)` or `(num_examples,)` and labels 0 and 1."""
