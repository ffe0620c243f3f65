"""From a batch to the sum over patients of clipped gradients, as one flat vector.

Every mode is a `Clipper`. They agree to rounding; they differ in cost.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedward.client.training.bookkeeping import Captured, leaves_of, sums_of
from fedward.client.training.parts import Loss, Memory
from fedward.client.training.sampler import Batch
from fedward.client.training.stack import stack_of


@dataclass(frozen=True, slots=True)
class Clipped:
    """What a clipper makes of a batch.

    Attributes:
        total: Sum over patients of clipped gradients, flat, in the order of the trained
            parameters; float32. It may be the clipper's own memory: valid until its next call.
        sanitised: Records whose gradient was not finite, and was taken as zero.
        squared_norms: Of the patients' gradients before clipping, shape `(patients,)`; without
            patients left out whole.
    """

    total: Tensor
    sanitised: int
    squared_norms: Tensor


class Clipper(Protocol):
    """Sums clipped gradients.

    A clipper is made of a model in training mode, a loss of one value an example, and the
    parameters to train in the order of the flat vector.
    """

    def __call__(self, batch: Batch, *, clip_norm: float) -> Clipped:
        """The sum over the patients of `batch` of gradients clipped to `clip_norm`."""
        ...

    def close(self) -> None:
        """Take off the model whatever was put on it."""
        ...


Run = Callable[[Batch], tuple[Tensor, Tensor]]


def sanitised(batch: Batch, run: Run, *, size: int) -> Clipped:
    """Run, and where a gradient is not finite run again without the records at fault.

    Args:
        batch: At least one patient.
        run: Gives the flat sum and the patients' squared norms, which are not finite where
            a gradient is not.
        size: Length of the flat sum.
    """
    total, squared = run(batch)
    if _finite(squared):
        return Clipped(total, 0, squared)
    alone = squared if batch.records == 1 else run(batch.one_by_one())[1]
    bad = ~torch.isfinite(alone)
    if batch.mask is not None:
        bad &= batch.mask > 0
    dropped = int(bad.sum())
    batch = batch.without(bad)
    if batch.patients:
        total, squared = run(batch)
        # Finite records whose sum overflows: the patient is left out whole.
        whole = torch.isfinite(squared)
        if not bool(whole.all()):
            dropped += int((~whole).sum())
            batch = batch.only(whole)
            if batch.patients:
                total, squared = run(batch)
    if not batch.patients or not bool(torch.isfinite(squared).all()):
        return Clipped(total.new_zeros(size), dropped + batch.patients, total.new_zeros(0))
    return Clipped(total, dropped, squared)


class BookKeeping:
    """One backward pass, norms from activations and output gradients.

    Raises:
        ValueError: A trained parameter is outside the layers that book-keeping knows.
    """

    def __init__(self, model: nn.Module, loss: Loss, trained: Sequence[nn.Parameter]) -> None:
        leaves = leaves_of(model)
        if leaves is None:
            raise ValueError("book-keeping does not fit this model; use mode='hooks'")
        self._leaves = leaves
        sizes = [p.numel() for p in trained]
        self._total = trained[0].detach().new_zeros(sum(sizes))
        places = {
            id(p): view.view(p.shape)
            for p, view in zip(trained, torch.split(self._total, sizes), strict=True)
        }
        self._into = {
            name: {
                own: places[id(p)]
                for own, p in leaf.named_parameters(recurse=False)
                if p.requires_grad
            }
            for name, leaf in leaves.items()
        }
        self._memory = Memory()
        self._stack = stack_of(model, loss, leaves, self._into)
        self._capture = functools.partial(Captured, model, loss, leaves)
        self._captured: Captured | None = None

    def __call__(self, batch: Batch, *, clip_norm: float) -> Clipped:
        """As `Clipper`."""
        if self._stack is not None and batch.records == 1 and self._stack.fits(batch):
            squared, finite = self._stack.clip(batch, clip_norm)
            if finite:
                return Clipped(self._total, 0, squared)

        def run(given: Batch) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return self._run(given, clip_norm)

        return sanitised(batch, run, size=self._total.numel())

    def _run(self, batch: Batch, clip_norm: float) -> tuple[Tensor, Tensor]:
        if self._stack is not None and self._stack.fits(batch):
            if batch.records == 1:
                return self._total, self._stack.clip(batch, clip_norm)[0]
            calls = self._stack.calls(batch)
        else:
            if self._captured is None:  # hooks cost something where nobody needs them
                self._captured = self._capture(batch.features, self._memory)
            calls = self._captured.run(batch.features, batch.labels, batch.mask)
        _, squared = sums_of(
            self._leaves,
            calls,
            clip_norm=clip_norm,
            records=batch.records,
            memory=self._memory,
            into=self._into,
        )
        for name in self._leaves.keys() - calls.keys():
            for place in self._into[name].values():
                place.zero_()
        return self._total, squared

    def close(self) -> None:
        """Take the hooks off the model."""
        if self._captured is not None:
            self._captured.close()


class Plain:
    """No clipping: the sum of gradients, by one backward pass. For `NotPrivate()` only."""

    def __init__(self, model: nn.Module, loss: Loss, trained: Sequence[nn.Parameter]) -> None:
        self._model, self._loss = model, loss
        self._trained = list(trained)

    def __call__(self, batch: Batch, *, clip_norm: float) -> Clipped:  # noqa: ARG002 (the interface)
        """As `Clipper`."""
        total = self._run(batch)
        if _finite(total):
            return Clipped(total, 0, total.new_zeros(0))
        # Slow and rare: find the records at fault one by one.
        single = batch.one_by_one()
        sums = [self._run(single.part(row, row + 1)) for row in range(single.patients)]
        kept = [value for value in sums if _finite(value)]
        total = torch.stack(kept).sum(0) if kept else torch.zeros_like(total)
        return Clipped(total, len(sums) - len(kept), total.new_zeros(0))

    def _run(self, batch: Batch) -> Tensor:
        with torch.enable_grad():
            losses = self._loss(self._model(batch.features), batch.labels)
            total = losses.sum() if batch.mask is None else (losses * batch.mask).sum()
            gradients = torch.autograd.grad(total, self._trained, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in gradients])

    def close(self) -> None:
        """Nothing was put on the model."""


def _finite(values: Tensor) -> bool:
    # One reduction: a sum is finite only if all terms are, or cancels never (squares), or
    # overflows, which the slow path then finds harmless.
    return math.isfinite(values.sum().item())
