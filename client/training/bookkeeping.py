"""Per-patient clipping at the cost of one backward pass.

Bu, Wang, Zha and Karypis, ICML 2023, Algorithm 1: one forward pass, one backward pass for the
gradients of the layers' outputs only, norms from those and the layers' inputs, and one weighted
contraction. Opacus' modes are the oracle in the tests.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fedward.client.training.convolutions import Turning, likes_turning
from fedward.client.training.leaves import part_of, supported
from fedward.client.training.normalisation import PixelSums
from fedward.client.training.parts import STABILITY, Call, Loss, Memory
from fedward.client.training.stack import one_a_row

ClippedSum = Callable[..., tuple[dict[str, Tensor], Tensor]]


def leaves_of(model: nn.Module) -> dict[str, nn.Module] | None:
    """The layers with parameters to train, by name; None if book-keeping does not fit the model.

    It fits where every trained parameter belongs to exactly one layer that is known.
    """
    leaves: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        if not supported(module) or any(id(p) in seen for p in own):
            return None
        seen.update(id(p) for p in own)
        leaves[name] = module
    return leaves


def clipping_factors(squared_norms: Tensor, clip_norm: Tensor | float) -> Tensor:
    """How much of each gradient is kept, as in Opacus; nothing of one that is not finite."""
    factors = (clip_norm / (squared_norms.sqrt() + STABILITY)).clamp(max=1.0)
    return torch.where(torch.isfinite(squared_norms), factors, torch.zeros_like(factors))


def finite_factors(squared_norms: Tensor, clip_norm: float) -> Tensor:
    """The same, where the caller throws away what a norm that is not finite makes of it."""
    # min(1, C / (norm + 1e-6)) is C / max(norm + 1e-6, C).
    return clip_norm / squared_norms.sqrt().add_(STABILITY).clamp_(min=clip_norm)


class Captured:
    """One forward and backward pass: what went into each layer, what gradient came back.

    Args:
        model: In training mode; hooked until `close`.
        loss: One value an example.
        leaves: The layers to listen to.
        features: A batch, such as will come.
        memory: For what is held between the passes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        leaves: Mapping[str, nn.Module],
        features: Tensor,
        memory: Memory,
    ) -> None:
        self._model, self._loss, self._leaves = model, loss, leaves
        likes = likes_turning(model, list(leaves.values()), features)
        self._turning = Turning(leaves.values(), memory) if likes else None
        self._record: list[tuple[str, Tensor, Any, PixelSums | None]] = []
        self._handles = [
            layer.register_forward_hook(self._hook(name)) for name, layer in leaves.items()
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        if self._turning is not None:
            self._turning.close()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # The edge, not the tensor: an activation in place changes what the tensor means.
            edge = torch.autograd.graph.get_gradient_edge(output)
            sums = None if self._turning is None else self._turning.sums(layer)
            given = inputs[0] if sums is None else output
            self._record.append((name, given.detach(), edge, sums))

        return hook

    def run(self, features: Tensor, labels: Tensor, mask: Tensor | None) -> dict[str, list[Call]]:
        """Calls of each layer, in order of use; layers that were not used are left out."""
        self._record = []
        with torch.enable_grad():
            losses = self._loss(self._model(features), labels)
            one_a_row(losses, features)
            total = losses.sum() if mask is None else (losses * mask).sum()
            record, self._record = self._record, []
            gradients = torch.autograd.grad(
                total, [edge for _, _, edge, _ in record], allow_unused=True
            )
        calls: dict[str, list[Call]] = {}
        for (name, given, _, sums), gradient in zip(record, gradients, strict=True):
            if gradient is not None:
                calls.setdefault(name, []).append(Call(given, gradient, sums))
        return calls


def sums_of(
    leaves: Mapping[str, nn.Module],
    calls: Mapping[str, list[Call]],
    *,
    clip_norm: Tensor | float,
    records: int = 1,
    memory: Memory | None = None,
    into: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Weighted sums by parameter name, and squared norms `(patients,)`, from one pass.

    Args:
        leaves: The layers with parameters to train.
        calls: What went in and what gradient came back.
        clip_norm: The bound.
        records: Rows of one patient.
        memory: For intermediate results; None to be pure.
        into: Where sums go, by layer and parameter; None for new tensors.
    """
    parts = {
        name: part_of(leaves[name], call, records=records, memory=memory)
        for name, call in calls.items()
    }
    squared = functools.reduce(torch.add, [part.squared_norm for part in parts.values()])
    # Whoever brings memory looks at the norms afterwards (`sanitised`).
    factors = (
        clipping_factors(squared, clip_norm)
        if memory is None or isinstance(clip_norm, Tensor)
        else finite_factors(squared, clip_norm)
    )
    sums: dict[str, Tensor] = {}
    for name, part in parts.items():
        for parameter, value in part.weighted(factors, into[name] if into else None).items():
            sums[f"{name}.{parameter}" if name else parameter] = value
    return sums, squared


def make_clipped_sum(
    model: nn.Module, loss: Loss, features: Tensor, *, records: int = 1
) -> ClippedSum:
    """A pure function that clips, to be used alone or under `torch.vmap` over stacked models.

    Args:
        model: Every trained parameter in a layer that book-keeping knows (`leaves_of`).
        loss: Of outputs and labels, one value an example.
        features: A batch of the shape that will be given, `(rows, ...)`; values do not matter.
        records: Rows of one patient, which stand together.

    Returns:
        `clipped_sum(parameters, x, y, mask, clip_norm)`: of all parameters by name, a batch, and
        which rows count (shape `(rows,)`, 0 or 1), the sum over patients of clipped gradients by
        name of the trained parameters, and the patients' squared norms. A row that is not finite
        makes its patient's squared norm not finite and adds nothing.

    Raises:
        ValueError: Book-keeping does not fit the model.
    """
    leaves = leaves_of(model)
    if leaves is None:
        raise ValueError("book-keeping does not fit this model; see leaves_of")
    tapped = _Tapped(model, leaves)
    shapes = tapped.probe(features)

    def clipped_sum(
        parameters: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        mask: Tensor,
        clip_norm: Tensor | float,
    ) -> tuple[dict[str, Tensor], Tensor]:
        def total(taps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            outputs, inputs = tapped.forward(parameters, x, taps)
            return torch.where(mask > 0, loss(outputs, y), 0.0).sum(), inputs

        dtype = next(iter(parameters.values())).dtype
        taps = [x.new_zeros((x.shape[0], *shape[1:]), dtype=dtype) for _, shape in shapes]
        gradients, inputs = grad(total, has_aux=True)(taps)
        finite = torch.ones_like(mask, dtype=torch.bool)
        for a, d in zip(inputs, gradients, strict=True):
            finite = finite & torch.isfinite(d.flatten(1).sum(1))
            if a.is_floating_point():
                finite = finite & torch.isfinite(a.flatten(1).sum(1))
        keep = finite & (mask > 0)
        calls: dict[str, list[Call]] = {}
        for (name, _), a, d in zip(shapes, inputs, gradients, strict=True):
            # Not a product: zero times NaN is NaN.
            calls.setdefault(name, []).append(Call(_only(keep, a), _only(keep, d)))
        whole = (finite | (mask <= 0)).reshape(-1, records).all(1)
        sums, squared = sums_of(leaves, calls, clip_norm=clip_norm, records=records)
        return sums, torch.where(whole, squared, torch.inf)

    return clipped_sum


class _Tapped:
    """A model whose layers' outputs are shifted by zeros, which can be differentiated by."""

    def __init__(self, model: nn.Module, leaves: Mapping[str, nn.Module]) -> None:
        self._model, self._leaves = model, leaves

    def probe(self, features: Tensor) -> list[tuple[str, torch.Size]]:
        """Layers and the shapes of their outputs, in order of use."""
        shapes: list[tuple[str, torch.Size]] = []

        def make(name: str) -> Callable[..., None]:
            def hook(_layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
                shapes.append((name, output.shape))

            return hook

        with self._hooked(make), torch.no_grad():
            self._model(features)
        return shapes

    def forward(
        self, parameters: Mapping[str, Tensor], features: Tensor, taps: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and what went into each layer, in order of use."""
        inputs: list[Tensor] = []

        def hook(_layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs.append(given[0])
            return output + taps[len(inputs) - 1]

        with self._hooked(lambda _name: hook):
            outputs: Tensor = functional_call(self._model, dict(parameters), (features,))
        return outputs, inputs

    @contextmanager
    def _hooked(self, make: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
        handles = [layer.register_forward_hook(make(name)) for name, layer in self._leaves.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _only(keep: Tensor, value: Tensor) -> Tensor:
    """Rows of `value` that `keep` names, zeros in place of the others."""
    return torch.where(keep.reshape(-1, *[1] * (value.dim() - 1)), value, torch.zeros_like(value))
