"""Gradients of many copies of one model at once: parameters, batches and sums are stacked.

What book-keeping does for one site (`client.training.bookkeeping`) is a pure function of arrays
of fixed shape, so that it runs under `torch.vmap` over sites; a linear model needs no autograd at
all. Where something is not finite the caller goes back to the code of a single site.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedward.client.training.bookkeeping import STABILITY, Loss, leaves_of, make_clipped_sum
from fedward.client.training.clippers import linear_of
from fedward.client.training.leaves import learns


@dataclass(frozen=True, slots=True)
class StackedBatch:
    """One step's batches of many sites, padded to one shape.

    Attributes:
        features: Shape `(sites, rows, ...)`; a row that does not count is zero.
        labels: Shape `(sites, rows, ...)`.
        mask: Shape `(sites, rows)`, 0 or 1: which rows count.
        records: Rows of one patient, which stand together.
    """

    features: Tensor
    labels: Tensor
    mask: Tensor
    records: int


class StackedSum(Protocol):
    """The sum of a batch's gradients, clipped by patient, for each site."""

    def __call__(self, parameters: Tensor, batch: StackedBatch) -> tuple[Tensor, Tensor]:
        """Of trained parameters `(sites, size)`: sums `(sites, size)`, and who is finite.

        The second is a boolean of shape `(sites,)`; the sum of a site that it leaves out must
        not be used.
        """
        ...


def make_stacked_sum(
    model: nn.Module, loss: Loss, features: Tensor, *, clip_norm: float | None, records: int
) -> StackedSum:
    """The cheapest way that fits the model.

    Args:
        model: Where shapes and frozen parameters come from.
        loss: One value an example.
        features: A batch of one site, for its shape.
        clip_norm: L2 bound of a patient's gradient; None in training without privacy.
        records: Rows of one patient.

    Raises:
        ValueError: The model has layers that book-keeping does not know.
    """
    linear = linear_of(model)
    if linear is not None and linear.weight.requires_grad and features.dim() == 2:  # noqa: PLR2004 (rows, columns)
        return _Linear(linear, loss, clip_norm)
    shapes = _Shapes(model)
    if clip_norm is None:
        return _plain(model, loss, shapes)
    return _clipped(model, loss, shapes, features, clip_norm=clip_norm, records=records)


def fits(model: nn.Module) -> bool:
    """Whether `make_stacked_sum` can stack the model: known layers, and nothing left to chance."""
    chance = any(isinstance(m, nn.modules.dropout._DropoutNd) for m in model.modules())  # noqa: SLF001 (the kinds have no public parent)
    return leaves_of(model) is not None and not chance


class _Shapes:
    """Which columns of the flat vector are which trained parameter; frozen ones stay as given."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        self._trained = [(name, p.shape) for name, p in named if p.requires_grad]
        self._sizes = [math.prod(shape) for _, shape in self._trained]
        self.fixed = {name: p.detach() for name, p in named if not p.requires_grad}

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """By name, with the leading axes of `flat` kept."""
        parts = torch.split(flat, self._sizes, dim=-1)
        return {
            name: part.reshape(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self._trained, parts, strict=True)
        }

    def join(self, sums: dict[str, Tensor], like: Tensor) -> Tensor:
        """The inverse of `split` for stacked sums; zeros for a parameter that was not used."""
        rows = len(like)
        return torch.cat(
            [
                sums[name].reshape(rows, -1) if name in sums else like.new_zeros(rows, size)
                for (name, _), size in zip(self._trained, self._sizes, strict=True)
            ],
            dim=1,
        )


def _clipped(
    model: nn.Module,
    loss: Loss,
    shapes: _Shapes,
    features: Tensor,
    *,
    clip_norm: float,
    records: int,
) -> StackedSum:
    one_site = make_clipped_sum(model, loss, features, records=records)

    def one(
        trained: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        return one_site({**trained, **shapes.fixed}, x, y, mask, clip_norm)

    many = torch.vmap(one)

    def stacked(parameters: Tensor, batch: StackedBatch) -> tuple[Tensor, Tensor]:
        sums, squared = many(shapes.split(parameters), batch.features, batch.labels, batch.mask)
        return shapes.join(sums, parameters), torch.isfinite(squared).all(1)

    return stacked


def _plain(model: nn.Module, loss: Loss, shapes: _Shapes) -> StackedSum:
    def total(trained: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        outputs = functional_call(model, {**trained, **shapes.fixed}, (x,))
        return (loss(outputs, y) * mask).sum()

    many = torch.vmap(grad(total))

    def stacked(parameters: Tensor, batch: StackedBatch) -> tuple[Tensor, Tensor]:
        sums = many(shapes.split(parameters), batch.features, batch.labels, batch.mask)
        joined = shapes.join(sums, parameters)
        return joined, torch.isfinite(joined.sum(1))

    return stacked


class _Linear:
    """One linear layer: a record's gradient is an outer product."""

    def __init__(self, layer: nn.Linear, loss: Loss, clip_norm: float | None) -> None:
        self._loss, self._clip_norm = loss, clip_norm
        self._biased = learns(layer, "bias")
        self._bias = None if self._biased or layer.bias is None else layer.bias.detach()
        self._shape = layer.weight.shape
        self._derivative: Callable[[Tensor, Tensor], Tensor] = getattr(
            loss, "output_gradient", self._differentiate
        )

    def __call__(self, parameters: Tensor, batch: StackedBatch) -> tuple[Tensor, Tensor]:
        """As `StackedSum`."""
        sites, size = len(parameters), self._shape.numel()
        weight = parameters[:, :size].view(sites, *self._shape)
        a = batch.features
        outputs = torch.bmm(a, weight.transpose(1, 2))
        if self._biased:
            outputs += parameters[:, None, size:]
        elif self._bias is not None:
            outputs += self._bias
        d = self._derivative(outputs.flatten(0, 1), batch.labels.flatten(0, 1)).view_as(outputs)
        d = d * batch.mask[..., None]
        if self._clip_norm is not None and batch.records > 1:
            return self._patients(a, d, batch.records, self._clip_norm)
        finite: Tensor | None = None
        if self._clip_norm is not None:
            length = torch.linalg.vecdot(a, a)
            if self._biased:
                length += 1
            squared = torch.linalg.vecdot(d, d).mul_(length)
            finite = torch.isfinite(squared.sum(1))
            d *= _factors(squared, self._clip_norm)[..., None]
        sums = [torch.bmm(d.transpose(1, 2), a).flatten(1)]
        if self._biased:
            sums.append(d.sum(1))
        total = torch.cat(sums, 1)
        return total, torch.isfinite(total.sum(1)) if finite is None else finite

    def _patients(
        self, a: Tensor, d: Tensor, records: int, clip_norm: float
    ) -> tuple[Tensor, Tensor]:
        sites = len(a)
        by_patient = (sites, -1, records)
        a, d = a.view(*by_patient, a.shape[-1]), d.view(*by_patient, d.shape[-1])
        gradients = (d.transpose(2, 3) @ a).flatten(2)
        squared = gradients.square().sum(2)
        biases = d.sum(2)
        if self._biased:
            squared += biases.square().sum(2)
        factors = _factors(squared, clip_norm)[:, None]
        sums = [torch.bmm(factors, gradients).squeeze(1)]
        if self._biased:
            sums.append(torch.bmm(factors, biases).squeeze(1))
        return torch.cat(sums, 1), torch.isfinite(squared.sum(1))

    def _differentiate(self, outputs: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            return torch.autograd.grad(self._loss(outputs, labels).sum(), outputs)[0]


def _factors(squared: Tensor, clip_norm: float) -> Tensor:
    return squared.sqrt().add_(STABILITY).reciprocal_().mul_(clip_norm).clamp_(max=1.0)
