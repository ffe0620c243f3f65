"""Class weights that stay inside the sensitivity analysis."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedward.client.training.parts import Loss
from fedward.tasks.losses import DifferentiatedLoss


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

    derivative = getattr(loss, "output_gradient", None)
    if derivative is None:
        return weigh

    def derive(outputs: Tensor, labels: Tensor) -> Tensor:
        each = table.to(outputs.device)[labels.long()]
        found: Tensor = derivative(outputs, labels)
        return found.mul_(each.view(-1, *[1] * (found.dim() - 1)))

    return DifferentiatedLoss(weigh, derive)
