"""Gradients of many copies of one model at once: parameters, batches and sums are stacked.

What book-keeping does for one site (`client.training.bookkeeping`) is a pure function of arrays
of fixed shape, so that it runs under `torch.vmap` over sites; plain layers need only batched
products. Where something is not finite the caller goes back to the code of a single site.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedward.client.training.bookkeeping import leaves_of, make_clipped_sum
from fedward.client.training.modes import validate
from fedward.client.training.parts import STABILITY, Loss


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
    shapes = _Shapes(model)
    layers = _plain_layers(model)
    if layers is not None and features.dim() == 2:  # noqa: PLR2004 (rows, columns)
        return _Layers(layers, loss, shapes, clip_norm)
    if clip_norm is None:
        return _plain(model, loss, shapes)
    validate(model)
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
        self.names = frozenset(name for name, _ in self._trained)
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


class _Layers:
    """Linear layers with elementwise functions between: batched products, and no `vmap`.

    A layer's gradient is the sum over rows of outer products of what came in and the gradient of
    what went out (Bu et al., ICML 2023, Algorithm 1), for all sites in one product.
    """

    def __init__(
        self, layers: Sequence[nn.Module], loss: Loss, shapes: "_Shapes", clip_norm: float | None
    ) -> None:
        self._layers, self._loss, self._shapes = layers, loss, shapes
        self._clip_norm = clip_norm

    def __call__(self, parameters: Tensor, batch: StackedBatch) -> tuple[Tensor, Tensor]:
        """As `StackedSum`."""
        values = self._shapes.split(parameters)
        inputs, gradients = self._run(values, batch)
        factors: Tensor | None = None
        finite: Tensor | None = None
        if self._clip_norm is not None:
            squared = self._squared(inputs, gradients, batch.records)
            finite = torch.isfinite(squared.sum(1))
            factors = _factors(squared, self._clip_norm)
            if batch.records > 1:
                factors = factors.repeat_interleave(batch.records, 1)
        sums: dict[str, Tensor] = {}
        for name, d in gradients.items():
            scaled = d if factors is None else d * factors[..., None]
            sums[f"{name}.weight"] = torch.bmm(scaled.transpose(1, 2), inputs[name])
            if f"{name}.bias" in values:
                sums[f"{name}.bias"] = scaled.sum(1)
        total = self._shapes.join(sums, parameters)
        return total, torch.isfinite(total.sum(1)) if finite is None else finite

    def _run(
        self, values: Mapping[str, Tensor], batch: StackedBatch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What goes into each layer, and the gradient of what comes out; nothing of padding."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        with torch.enable_grad():
            h = batch.features.flatten(2)
            for number, layer in enumerate(self._layers):
                if not isinstance(layer, nn.Linear):
                    h = layer(h)
                    continue
                name = str(number)
                inputs[name] = h.detach()
                weight, bias = values[f"{name}.weight"].transpose(1, 2), values.get(f"{name}.bias")
                h = (
                    torch.bmm(h, weight)
                    if bias is None
                    else torch.baddbmm(bias[:, None], h, weight)
                )
                if not h.requires_grad:
                    h.requires_grad_()
                outputs[name] = h
            losses = self._loss(h.flatten(0, 1), batch.labels.flatten(0, 1))
            total = (losses * batch.mask.flatten()).sum()
            found = torch.autograd.grad(total, list(outputs.values()))
        return inputs, dict(zip(outputs, found, strict=True))

    def _squared(
        self, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], records: int
    ) -> Tensor:
        """Squared norm of each patient's gradient, shape `(sites, patients)`."""
        squared: list[Tensor] = []
        for name, d in gradients.items():
            a = inputs[name]
            biased = f"{name}.bias" in self._shapes.names
            if records == 1:
                length = torch.linalg.vecdot(a, a)
                squared.append(torch.linalg.vecdot(d, d) * (length + 1 if biased else length))
                continue
            by_patient = d.view(len(d), -1, records, d.shape[-1])
            rows = a.view(len(a), -1, records, a.shape[-1])
            squared.append((by_patient.transpose(2, 3) @ rows).square().sum((2, 3)))
            if biased:
                squared.append(by_patient.sum(2).square().sum(2))
        return torch.stack(squared).sum(0)


_ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Identity)


def _plain_layers(model: nn.Module) -> list[nn.Module] | None:
    """The layers of a model of linear layers and elementwise functions, all trained; or None."""
    if type(model) is not nn.Sequential:
        return None
    layers = list(model)
    known = all(type(layer) is nn.Linear or type(layer) in _ELEMENTWISE for layer in layers)
    if not known or not all(p.requires_grad for p in model.parameters()):
        return None
    return layers


def _factors(squared: Tensor, clip_norm: float) -> Tensor:
    return squared.sqrt().add_(STABILITY).reciprocal_().mul_(clip_norm).clamp_(max=1.0)
