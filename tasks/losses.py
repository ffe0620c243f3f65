"""Losses that know their own derivative, one value an example.

A linear model's step without privacy spends half of its time in autograd; with privacy nothing
but the derivative of the loss by the outputs is needed of it, and that is a line of arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DifferentiatedLoss:
    """A loss and its derivative.

    Attributes:
        values: Of outputs and labels, one value an example, for autograd.
        output_gradient: Of outputs and labels, the gradient of the summed values by the outputs,
            as a new tensor without a graph.
    """

    values: "Callable[[Tensor, Tensor], Tensor]"
    output_gradient: "Callable[[Tensor, Tensor], Tensor]"

    def __call__(self, outputs: "Tensor", labels: "Tensor") -> "Tensor":
        """One value an example."""
        return self.values(outputs, labels)


def _cross_entropy(outputs: "Tensor", labels: "Tensor") -> "Tensor":
    from torch.nn.functional import cross_entropy as values

    return values(outputs, labels, reduction="none")


def _softmax_less_label(outputs: "Tensor", labels: "Tensor") -> "Tensor":
    import torch

    if outputs.device.type != "cpu" or outputs.dtype != torch.float32 or outputs.shape[1] != 2:  # noqa: PLR2004 (classes)
        d = torch.softmax(outputs.detach(), 1)
        return d.scatter_add_(1, labels[:, None], d.new_full((1, 1), -1.0).expand(len(d), 1))
    # Two classes: NumPy's calls take a third of the time of torch's.
    return torch.from_numpy(_of_two(outputs.detach().numpy(), labels.numpy()))


def _of_two(outputs: NDArray[np.float32], classes: NDArray[np.int64]) -> NDArray[np.float32]:
    if classes.min(initial=0) < 0:
        raise IndexError("a class number is 0 or 1")
    d = np.empty_like(outputs)
    with np.errstate(over="ignore", invalid="ignore"):  # 1 / (1 + inf) is 0, and NaN stays
        odds = np.exp(outputs[:, 0] - outputs[:, 1])
        odds += 1
        np.divide(1, odds, out=d[:, 1])
        np.subtract(1, d[:, 1], out=d[:, 0])
    d -= _TWO.take(classes, 0)  # refuses 2 and more
    return d


_TWO = np.eye(2, dtype=np.float32)


def _binary_cross_entropy(outputs: "Tensor", labels: "Tensor") -> "Tensor":
    from torch.nn.functional import binary_cross_entropy_with_logits as values

    return values(outputs.reshape(-1), labels.to(outputs.dtype), reduction="none")


def _probability_less_label(outputs: "Tensor", labels: "Tensor") -> "Tensor":
    import torch

    d = torch.sigmoid(outputs.detach())
    return d.sub_(labels.to(d.dtype).view(d.shape))


cross_entropy = DifferentiatedLoss(_cross_entropy, _softmax_less_label)
"""Of outputs `(num_examples, classes)` and labels as class numbers."""

binary_cross_entropy = DifferentiatedLoss(_binary_cross_entropy, _probability_less_label)
"""Of log-odds `(num_examples, 1)` or `(num_examples,)` and labels 0 and 1."""
