"""Linear models: the gradient of a record is an outer product, and no autograd is in the model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.client.training.bookkeeping import STABILITY
from fedward.client.training.clippers import Clipped, sanitised
from fedward.client.training.leaves import learns
from fedward.client.training.parts import Loss
from fedward.client.training.sampler import Batch
from fedward.client.training.stack import derivative_of

# Below these, NumPy takes a third of the time of torch, most of which goes into calls. NumPy's
# own matrix products stay on one thread.
_SMALL_OUTPUTS = 1 << 13
_SMALL_PRODUCT = 1 << 17

Array = NDArray[np.float32]


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
        # Every operation counts in a step that takes a tenth of a millisecond: sums go to the
        # places of weight and bias in one vector.
        size = layer.weight.numel()
        self._total = layer.weight.new_zeros(sum(p.numel() for p in trained), requires_grad=False)
        self._weight = self._total[:size].view(layer.weight.shape)
        self._bias = self._total[size:]
        # Rows, up to which NumPy is the quicker one.
        self._few = min(_SMALL_OUTPUTS, _SMALL_PRODUCT // layer.in_features) // layer.out_features
        self._shared: _Shared | None = None

    def __call__(self, batch: Batch, *, clip_norm: float) -> Clipped:
        """As `Clipper`."""
        if self._small(batch):
            squared = self._run_small(batch, clip_norm)
            if math.isfinite(squared.sum()):
                return Clipped(self._total, 0, torch.from_numpy(squared))
        with torch.no_grad():
            return sanitised(
                batch, lambda given: self._run(given, clip_norm), size=self._total.numel()
            )

    def _small(self, batch: Batch) -> bool:
        a = batch.features
        return (
            batch.records == 1
            and batch.mask is None
            and a.dim() == 2  # noqa: PLR2004 (rows, columns)
            and a.shape[0] <= self._few
            and a.dtype == self._total.dtype == torch.float32
            and a.is_cpu
            and self._total.is_cpu
        )

    def _run_small(self, batch: Batch, clip_norm: float) -> Array:
        """As `_run`, in NumPy; squared norms alone."""
        shared = self._shared
        if shared is None or shared.at != self._layer.weight.data_ptr():
            shared = self._shared = self._share()
        a: Array = batch.features.numpy()
        with np.errstate(all="ignore"):  # what is not finite shows in the squared norms
            outputs = np.matmul(a, shared.turned)
            if shared.bias is not None:
                outputs += shared.bias
            # Tensors with strides of their own, or of another type, are the loss's business.
            d: Array = np.asarray(
                self._derivative(torch.from_numpy(outputs), batch.labels).numpy(), dtype=np.float32
            )
            length = np.square(a) @ shared.columns
            if self._biased:
                length += 1
            squared: Array = np.square(d) @ shared.outputs
            squared *= length
            factors = np.sqrt(squared)
            factors += STABILITY
            np.maximum(factors, clip_norm, out=factors)
            np.divide(clip_norm, factors, out=factors)
            if self._biased:
                np.matmul(factors, d, out=shared.bias_sum)
            np.matmul((d * factors[:, None]).T, a, out=shared.weight_sum)
        return squared

    def _share(self) -> "_Shared":
        layer = self._layer
        bias: Tensor | None = layer.bias
        return _Shared(
            at=layer.weight.data_ptr(),
            turned=layer.weight.detach().numpy().T,
            bias=None if bias is None else bias.detach().numpy(),
            weight_sum=self._weight.numpy(),
            bias_sum=self._bias.numpy(),
            columns=np.ones(layer.in_features, np.float32),
            outputs=np.ones(layer.out_features, np.float32),
        )

    def _run(self, batch: Batch, clip_norm: float) -> tuple[Tensor, Tensor]:
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


@dataclass(frozen=True, slots=True)
class _Shared:
    """Arrays in the memory of tensors, for small batches, and ones to add up with.

    Attributes:
        at: Where the weight was: a session moves parameters.
        turned: The weight, shape `(in_features, out_features)`.
        bias: Shape `(out_features,)`, or None.
        weight_sum: Where the weight's sum goes.
        bias_sum: Where the bias's sum goes, empty if it is not trained.
        columns: Ones, one a column of the features.
        outputs: Ones, one an output.
    """

    at: int
    turned: Array
    bias: Array | None
    weight_sum: Array
    bias_sum: Array
    columns: Array
    outputs: Array


def linear_of(model: nn.Module) -> nn.Linear | None:
    """The layer of a model that is one linear layer and nothing else, or None."""
    if type(model) is nn.Linear:
        return model
    if type(model) is nn.Sequential:
        inner = [m for m in model if type(m) not in (nn.Identity, nn.Flatten)]
        if len(inner) == 1 and type(inner[0]) is nn.Linear:
            return inner[0]
    return None
