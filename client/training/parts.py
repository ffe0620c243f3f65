"""What a layer adds to per-patient gradient norms, and where its sums and intermediates go."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedward.client.training.normalisation import PixelSums

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs and labels, one value an example."""

STABILITY = 1e-6  # in Opacus' clipping factor, clip_norm / (norm + 1e-6)


class Call(NamedTuple):
    """One use of a layer."""

    given: Tensor
    """What went in."""

    gradient: Tensor
    """Of what came out."""

    sums: PixelSums | None = None
    """Of a group normalisation that may forget what went in."""


Sums = Mapping[str, Tensor]
Into = Mapping[str, Tensor] | None
"""By parameter name, contiguous places for sums; None for new tensors."""


@dataclass(frozen=True, slots=True)
class Part:
    """A layer's share.

    Attributes:
        squared_norm: Shape `(patients,)`.
        weighted: Of factors `(patients,)` and places for the sums, the weighted sums of gradients
            by parameter name.
    """

    squared_norm: Tensor
    weighted: Callable[[Tensor, Into], Sums]


class Memory:
    """Large intermediate tensors, which are written again in every step.

    New ones in every step would cost more in page faults than what is computed in them.
    """

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def take(self, key: object, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of `shape` that holds zeros or what was written to it; valid until the next."""
        size = math.prod(shape)
        held = self._held.get(key)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self._held[key] = like.new_zeros(size + size // 8)  # batches differ
        return held[:size].view(*shape)


def squared_norms(values: Tensor) -> Tensor:
    """Squared norms of rows, in one pass."""
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return norms * norms


def impure(values: Tensor, memory: Memory | None) -> bool:
    """Whether NumPy may work in a tensor's memory."""
    return memory is not None and values.is_cpu and values.dtype == torch.float32


def at(into: Into, name: str) -> Tensor | None:
    """The place of a parameter's sum, for `out`."""
    return None if into is None else into[name]


def room(memory: Memory | None, key: object, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """A tensor that is used again, for `out`."""
    return None if memory is None else memory.take(key, shape, like)


def weigh(factors: Tensor, values: Tensor, into: Into, name: str) -> Tensor:
    """The sum over patients of `values`, by `factors`."""
    if into is None:
        return (factors @ values.flatten(1)).view(values.shape[1:])
    torch.mv(values.flatten(1).t(), factors, out=into[name].view(-1))
    return into[name]


def stored(gradients: Mapping[str, Tensor | None], weight: torch.Size) -> Part:
    """A share whose per-patient gradients are small enough to keep."""
    kept = {name: value for name, value in gradients.items() if value is not None}
    squared: Tensor | None = None
    for value in kept.values():
        norm = squared_norms(value)
        squared = norm if squared is None else squared + norm
    if squared is None:
        raise ValueError("a layer without trained parameters has no share")

    def weighted(factors: Tensor, into: Into) -> Sums:
        sums = {name: weigh(factors, value, into, name) for name, value in kept.items()}
        if "weight" in sums:
            sums["weight"] = sums["weight"].view(weight)
        return sums

    return Part(squared, weighted)


def by_patient(value: Tensor, records: int) -> Tensor:
    """`(patients * records, positions, ...)` to `(patients, records * positions, ...)`."""
    if records == 1:
        return value
    return value.reshape(len(value) // records, records * value.shape[1], *value.shape[2:])


def sum_records(value: Tensor, records: int) -> Tensor:
    """`(patients * records, ...)` to `(patients, ...)`."""
    if records == 1:
        return value
    return value.reshape(len(value) // records, records, *value.shape[1:]).sum(1)
