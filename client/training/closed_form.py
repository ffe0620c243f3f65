"""Linear models: the gradient of a record is an outer product, and no autograd is in the model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedward.client.training.clippers import Clipped, sanitised
from fedward.client.training.leaves import learns
from fedward.client.training.parts import STABILITY, Loss
from fedward.client.training.sampler import Batch
from fedward.client.training.stack import Stack, derivative_of


class ClosedForm:
    """A linear model: the gradient of a record is an outer product; no autograd in the model.

    Raises:
        ValueError: The model is not one linear layer.
    """

    def __init__(self, model: nn.Module, loss: Loss, trained: Sequence[nn.Parameter]) -> None:
        layer = linear_of(model)
        if layer is None:
            raise ValueError("closed form is for models that are one nn.Linear")
        if not layer.weight.requires_grad:
            raise ValueError("closed form trains the weight")
        self._layer = layer
        self._biased = learns(layer, "bias")
        self._derivative = derivative_of(loss)
        # Sums go to the places of weight and bias in one vector.
        size = layer.weight.numel()
        self._total = layer.weight.new_zeros(sum(p.numel() for p in trained), requires_grad=False)
        self._weight = self._total[:size].view(layer.weight.shape)
        self._bias = self._total[size:]
        into = {"weight": self._weight, **({"bias": self._bias} if self._biased else {})}
        self._stack = Stack([layer], loss, {"": into}, {layer: ""}, flattens=True)

    def __call__(self, batch: Batch, *, clip_norm: float) -> Clipped:
        """As `Clipper`."""
        if batch.records == 1 and self._stack.fits(batch):
            squared, finite = self._stack.clip(batch, clip_norm)
            if finite:
                return Clipped(self._total, 0, squared)
        with torch.no_grad():
            return sanitised(
                batch, lambda given: self._run(given, clip_norm), size=self._total.numel()
            )

    def _run(self, batch: Batch, clip_norm: float) -> tuple[Tensor, Tensor]:
        if batch.records == 1 and self._stack.fits(batch):
            return self._total, self._stack.clip(batch, clip_norm)[0]
        layer, a = self._layer, batch.features
        if a.dim() > 2:  # noqa: PLR2004 (rows, columns)
            a = a.flatten(1)
        d = self._derivative(nn.functional.linear(a, layer.weight, layer.bias), batch.labels)
        if batch.mask is not None:
            d = d * batch.mask[:, None]
        if batch.records > 1:
            return self._patients(a, d, batch.records, clip_norm)
        length = torch.linalg.vecdot(a, a)
        if self._biased:
            length += 1
        squared = torch.linalg.vecdot(d, d).mul_(length)
        # min(1, C / (norm + 1e-6)) is C / max(norm + 1e-6, C).
        d = d / squared.sqrt().add_(STABILITY).clamp_(min=clip_norm)[:, None]
        torch.addmm(self._weight, d.t(), a, beta=0, alpha=clip_norm, out=self._weight)
        if self._biased:
            torch.sum(d, 0, out=self._bias).mul_(clip_norm)
        return self._total, squared

    def _patients(
        self, a: Tensor, d: Tensor, records: int, clip_norm: float
    ) -> tuple[Tensor, Tensor]:
        patients = len(a) // records
        a, d = a.view(patients, records, -1), d.view(patients, records, -1)
        weight, bias = d.transpose(1, 2) @ a, d.sum(1)
        squared = weight.square().sum((1, 2))
        if self._biased:
            squared += bias.square().sum(1)
        factors = clip_norm / (squared.sqrt() + STABILITY).clamp(min=clip_norm)
        self._weight.copy_((factors @ weight.flatten(1)).view(weight.shape[1:]))
        if self._biased:
            self._bias.copy_(factors @ bias)
        return self._total, squared

    def close(self) -> None:
        """Nothing was put on the model."""


def linear_of(model: nn.Module) -> nn.Linear | None:
    """The layer of a model that is one linear layer and nothing else, or None."""
    if type(model) is nn.Linear:
        return model
    if type(model) is nn.Sequential:
        inner = [m for m in model if type(m) not in (nn.Identity, nn.Flatten)]
        if len(inner) == 1 and type(inner[0]) is nn.Linear:
            return inner[0]
    return None
