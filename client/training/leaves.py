"""What each kind of layer adds to per-patient gradient norms and to their weighted sum.

Book-keeping (Bu, Wang, Zha and Karypis, ICML 2023, "Differentially private optimization on
large model at small cost", Algorithm 1) needs of a layer only its inputs `a` and the gradients
`d` of its outputs: the squared norm of every patient's gradient, and, once the clipping factors
are known, the sum of the gradients that they weigh. Without a `Memory` all is pure arithmetic on
tensors of fixed shape, so that it also runs under `torch.vmap` over stacked models.

Rows come patient by patient, `records` rows a patient; a patient's gradient is the sum over
the rows, so rows are treated as one more axis of positions.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedward.client.training.convolutions import image_part
from fedward.client.training.embeddings import embedding
from fedward.client.training.parts import (
    Call,
    Into,
    Memory,
    Part,
    Sums,
    at,
    by_patient,
    impure,
    room,
    squared_norms,
    stored,
    sum_records,
    weigh,
)

# Of a Gram sum that cancels to less than this share of its terms, float32 leaves too few
# digits: an adversarial record could pass for shorter than it is.
_CANCELLATION = 1e-3
_KEPT = 2**21  # numbers, 8 MiB
_ROUNDING = 2.0**-20  # 16 units in the last place of float32


def supported(layer: nn.Module) -> bool:
    """Whether `part_of` knows this layer as it is configured."""
    kind = type(layer)
    if kind in (nn.Linear, nn.GroupNorm, nn.LayerNorm) or _is_rnn_linear(kind):
        return True
    if isinstance(layer, nn.Embedding) and kind is nn.Embedding:
        return layer.max_norm is None and not layer.sparse and not layer.scale_grad_by_freq
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and kind in (nn.Conv1d, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return False


def _is_rnn_linear(kind: type[nn.Module]) -> bool:
    """Opacus' own linear layer; a model that has one has imported Opacus, which takes seconds."""
    opacus = sys.modules.get("opacus.layers.dp_rnn")
    return opacus is not None and kind is opacus.RNNLinear


def learns(layer: nn.Module, name: str) -> bool:
    """Whether the layer has a parameter of this name, and trains it."""
    parameter = getattr(layer, name, None)
    return isinstance(parameter, nn.Parameter) and parameter.requires_grad


def part_of(
    layer: nn.Module, calls: Sequence[Call], *, records: int, memory: Memory | None = None
) -> Part:
    """A layer's share of every patient's gradient.

    Args:
        layer: One that is `supported`.
        calls: One for each time that the forward pass used the layer; a recurrent cell's
            gradient is the sum over its steps.
        records: Rows of one patient.
        memory: For intermediate results; None where all is to be pure and of fixed shapes.
    """
    match layer:
        case nn.Linear():
            return _linear(layer, calls, records, memory)
        case nn.Embedding():
            return embedding(layer, calls, records, memory)
        case nn.Conv1d() | nn.Conv2d():
            return _convolution(layer, calls, records, memory)
        case nn.GroupNorm() | nn.LayerNorm():
            return _affine(layer, calls, records)
        case _:
            raise ValueError(f"book-keeping does not know {type(layer).__name__}")


def _linear(layer: nn.Linear, calls: Sequence[Call], records: int, memory: Memory | None) -> Part:
    trained = learns(layer, "weight")
    biased = learns(layer, "bias")
    if len(calls) == 1 and records == 1 and calls[0][1].dim() == 2:  # noqa: PLR2004 (rows, columns)
        return _linear_once(layer, *calls[0][:2], memory)
    a, d = _positions(calls, records)
    squared: Tensor | float = 0.0
    gradients: Tensor | None = None
    if trained:
        size = layer.in_features * layer.out_features
        # Kept gradients make the sum almost free, while they fit into the cache.
        keep = len(a) * size <= _KEPT or (
            a.shape[1] * (layer.in_features + layer.out_features) >= size
        )
        if not keep:
            squared = _gram(a, d)
        else:
            shape = (len(a), layer.out_features, layer.in_features)
            gradients = torch.bmm(
                d.transpose(1, 2), a, out=room(memory, (layer, "gradients"), shape, d)
            )
            squared = squared_norms(gradients)
    summed = d.sum(1) if biased else None
    if summed is not None:
        squared = squared + summed.square().sum(1)

    def weighted(factors: Tensor, into: Into) -> Sums:
        sums = {}
        if gradients is not None:
            sums["weight"] = weigh(factors, gradients, into, "weight")
        elif trained:
            place = room(memory, (layer, "scaled"), d.shape, d)
            scaled = torch.mul(d, factors[:, None, None], out=place).flatten(0, 1)
            sums["weight"] = torch.mm(scaled.t(), a.flatten(0, 1), out=at(into, "weight"))
        if summed is not None:
            sums["bias"] = weigh(factors, summed, into, "bias")
        return sums

    return Part(_as_tensor(squared, d), weighted)


def _linear_once(layer: nn.Linear, a: Tensor, d: Tensor, memory: Memory | None) -> Part:
    """The gradient of a row is the outer product of `d` and `a`."""
    trained, biased = learns(layer, "weight"), learns(layer, "bias")
    if memory is not None and impure(a, memory) and impure(d, memory):
        return _linear_small(layer, a, d, memory)
    squared = squared_norms(d)
    if trained:
        length = squared_norms(a)
        squared = squared * (length + 1 if biased else length)

    def weighted(factors: Tensor, into: Into) -> Sums:
        scaled = torch.mul(d, factors[:, None], out=room(memory, (layer, "scaled"), d.shape, d))
        sums = {}
        if trained:
            sums["weight"] = torch.mm(scaled.t(), a, out=at(into, "weight"))
        if biased:
            sums["bias"] = torch.sum(scaled, 0, out=at(into, "bias"))
        return sums

    return Part(squared, weighted)


def _linear_small(layer: nn.Linear, a: Tensor, d: Tensor, memory: Memory) -> Part:
    """The same by NumPy, whose calls take a third of the time; the large product is torch's."""
    trained, biased = learns(layer, "weight"), learns(layer, "bias")
    inputs, gradients = a.detach().numpy(), d.detach().numpy()
    with np.errstate(all="ignore"):  # what is not finite shows in the norm
        squared: NDArray[np.float32] = np.vecdot(gradients, gradients)
        if trained:
            length: NDArray[np.float32] = np.vecdot(inputs, inputs)
            if biased:
                length += 1
            squared *= length

    def weighted(factors: Tensor, into: Into) -> Sums:
        kept, sums = factors.numpy(), {}
        with np.errstate(all="ignore"):
            if trained:
                scaled = memory.take((layer, "scaled"), d.shape, d)
                np.multiply(gradients, kept[:, None], out=scaled.numpy())
                sums["weight"] = torch.mm(scaled.t(), a, out=at(into, "weight"))
            if biased:
                place = d.new_empty(d.shape[1]) if into is None else into["bias"]
                np.matmul(kept, gradients, out=place.numpy())
                sums["bias"] = place
        return sums

    return Part(torch.from_numpy(squared), weighted)


def _gram(a: Tensor, d: Tensor) -> Tensor:
    """Squared norms of sums of outer products, without making them.

    Where the terms cancel, what rounding may have taken away is added: a norm is never
    understated by more than a few parts in 10^4, whatever the record.
    """
    squared = ((d @ d.transpose(1, 2)) * (a @ a.transpose(1, 2))).sum((1, 2))
    lengths = (torch.linalg.vecdot(d, d) * torch.linalg.vecdot(a, a)).sqrt().sum(1).square()
    safe = squared.clamp(min=0) + lengths * _ROUNDING
    return torch.where(squared < lengths * _CANCELLATION, safe, squared)


def _convolution(
    layer: nn.Conv1d | nn.Conv2d, calls: Sequence[Call], records: int, memory: Memory | None
) -> Part:
    trained = learns(layer, "weight")
    biased = learns(layer, "bias")
    once = len(calls) == 1 and trained and layer.groups == 1 and calls[0][1].is_cpu
    if memory is not None and once and isinstance(layer, nn.Conv2d):
        return image_part(layer, *calls[0][:2], records=records, memory=memory, biased=biased)
    gradients: Tensor | None = None
    summed: Tensor | None = None
    for number, (a, d, _) in enumerate(calls):
        flat = d.flatten(2)
        if trained:
            kernels = _kernel_gradients(layer, a, flat, memory, number)
            one = sum_records(kernels, records)
            gradients = one if gradients is None else gradients + one
        if biased:
            bias = sum_records(flat.sum(2), records)
            summed = bias if summed is None else summed + bias
    return stored({"weight": gradients, "bias": summed}, layer.weight.shape)


def _kernel_gradients(
    layer: nn.Conv1d | nn.Conv2d, a: Tensor, d: Tensor, memory: Memory | None, number: int
) -> Tensor:
    """Shape `(rows, out_channels, in_channels / groups * kernel)`."""
    if isinstance(layer.padding, str):
        raise TypeError("padding is a number; see `supported`")
    kernel, stride, padding, dilation = (
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
    )
    if isinstance(layer, nn.Conv1d):
        a = a.unsqueeze(2)
        kernel, stride, padding, dilation = (
            (1, *kernel),
            (1, *stride),
            (0, *padding),
            (1, *dilation),
        )
    rows, positions = len(d), d.shape[2]
    if memory is None:
        patches = functional.unfold(a, kernel, padding=padding, stride=stride, dilation=dilation)
    else:
        shape = (rows, a.shape[1] * math.prod(kernel), positions)
        patches = torch.ops.aten.im2col.out(
            a, kernel, dilation, padding, stride, out=memory.take((layer, "patches"), shape, a)
        )
    if layer.groups == 1:
        shape = (rows, layer.out_channels, patches.shape[1])
        place = room(memory, (layer, "gradients", number), shape, d)
        return torch.bmm(d, patches.transpose(1, 2), out=place)
    d = d.reshape(rows, layer.groups, -1, positions)
    patches = patches.reshape(rows, layer.groups, -1, positions)
    return (d @ patches.transpose(2, 3)).flatten(1, 2)


def _affine(layer: nn.GroupNorm | nn.LayerNorm, calls: Sequence[Call], records: int) -> Part:
    weight: Tensor | None = None
    bias: Tensor | None = None
    for a, d, sums in calls:
        if sums is not None:
            product, plain = sums.of(d)
        elif isinstance(layer, nn.GroupNorm):
            normal = functional.group_norm(a, layer.num_groups, eps=layer.eps)
            product, plain = (normal * d).flatten(2).sum(2), d.flatten(2).sum(2)
        else:
            normal = functional.layer_norm(a, layer.normalized_shape, eps=layer.eps)
            shape = (len(d), -1, *layer.normalized_shape)
            product, plain = (normal * d).reshape(shape).sum(1), d.reshape(shape).sum(1)
        product, plain = sum_records(product, records), sum_records(plain, records)
        weight = product if weight is None else weight + product
        bias = plain if bias is None else bias + plain
    return stored(
        {
            "weight": weight if learns(layer, "weight") else None,
            "bias": bias if learns(layer, "bias") else None,
        },
        layer.weight.shape,
    )


def _positions(calls: Sequence[Call], records: int) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients as `(patients, positions, columns)`."""
    inputs = [by_patient(a.reshape(len(a), -1, a.shape[-1]), records) for a, *_ in calls]
    outputs = [by_patient(d.reshape(len(d), -1, d.shape[-1]), records) for _, d, _ in calls]
    if len(calls) == 1:
        return inputs[0], outputs[0]
    return torch.cat(inputs, 1), torch.cat(outputs, 1)


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((len(like),), value)
