"""Class weights that stay inside the sensitivity analysis."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedward.client.training.parts import Loss
from fedward.tasks.losses import DifferentiatedLoss, OutputGradient


def weighted(loss: Loss, weights: Sequence[float], *, largest: float = 10.0) -> Loss:
    """`loss` with each class's examples weighted, before anything is clipped.

    The weight is part of a record's gradient, which is clipped afterwards, so no weight moves
    the sum by more than the clip norm. The weights themselves must be public: computed from
    the labels of a site they would be an unpriced release.

    Args:
        loss: Of outputs and labels, one value an example.
        weights: One a class, by its number; each in (0, `largest`].
        largest: Bound on a weight. Beyond it, all of a rare class would be clipped and the
            weight would only take from the others.

    Raises:
        ValueError: A weight is outside its range.
    """
    if not weights or any(not 0 < w <= largest for w in weights):
        raise ValueError(f"class weights are in (0, {largest}], got {list(weights)}")
    table = torch.tensor(weights, dtype=torch.float32)

    def weigh(outputs: Tensor, labels: Tensor) -> Tensor:
        return loss(outputs, labels) * table.to(outputs.device)[labels.long()]

    derivative: OutputGradient | None = getattr(loss, "output_gradient", None)
    if derivative is None:
        return weigh
    array = table.numpy()

    def derive(outputs: NDArray[np.float32], labels: NDArray[Any]) -> NDArray[np.float32]:
        found = derivative(outputs, labels)
        each = array[labels.astype(np.int64, copy=False)]
        found *= each.reshape(-1, *[1] * (found.ndim - 1))
        return found

    return DifferentiatedLoss(weigh, derive)
