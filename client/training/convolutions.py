"""Convolutions on a CPU: memory laid out as its kernels like it, and gradients of every record.

oneDNN convolves, and torch pools, several times faster where the channels of a pixel stand
together ("channels last"). The layers that book-keeping listens to lay out so what goes into them,
which changes where numbers stand and no number; `normalisation` takes them as they stand.
"""

import functools
import math
from collections.abc import Callable, Collection
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.client.training.normalisation import PixelSums, normalised
from fedward.client.training.parts import Into, Memory, Part, Sums, squared_norms, sum_records

Array = NDArray[np.float32]

_LAST = torch.channels_last
_IMAGES = 4  # dimensions: rows, channels, height, width
_FEW = 8  # channels, below which patches are made plane by plane
_LIKES: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


class Turning:
    """Lays images out, channels last, for the layers of a model, and normalises them so.

    Args:
        layers: Those that book-keeping listens to.
        memory: For what is held no longer than a step.
    """

    def __init__(self, layers: Collection[nn.Module], memory: Memory) -> None:
        self._memory = memory
        self._sums: dict[nn.Module, PixelSums] = {}
        self._normalising = [layer for layer in layers if isinstance(layer, nn.GroupNorm)]
        for layer in self._normalising:
            # Of this one layer, before its class's own.
            vars(layer)["forward"] = functools.partial(self._normalise, layer, layer.forward)
        self._handles = [
            layer.register_forward_pre_hook(_turn)
            for layer in layers
            if isinstance(layer, nn.Conv2d)
        ]

    def sums(self, layer: nn.Module) -> PixelSums | None:
        """What the layer's last use leaves behind, if it is one that normalises."""
        return self._sums.pop(layer, None)

    def close(self) -> None:
        """Leave the layers as they were."""
        for handle in self._handles:
            handle.remove()
        for layer in self._normalising:
            del vars(layer)["forward"]

    def _normalise(self, layer: nn.GroupNorm, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if x.dim() != _IMAGES:
            return own(x)
        output, self._sums[layer] = normalised(layer, x, self._memory.take(Turning, x.shape, x))
        return output


def _turn(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    return (_channels_last(x) if x.dim() == _IMAGES else x, *inputs[1:])


def _copied(x: Tensor, out: Tensor) -> Tensor:
    """`out`, of another order in memory, for which NumPy takes half of torch's time."""
    np.copyto(out.detach().numpy(), x.detach().numpy())
    return out


def _channels_last(x: Tensor) -> Tensor:
    if x.shape[1] == 1 and not x.requires_grad and x.is_contiguous():
        # One channel is both; only the strides tell the kernels which one is meant.
        return x.as_strided(x.shape, (x.shape[2] * x.shape[3], 1, x.shape[3], 1))
    return x.contiguous(memory_format=_LAST)


def likes_turning(model: nn.Module, leaves: list[nn.Module], features: Tensor) -> bool:
    """Whether the model convolves images on a CPU, and gives the same with channels last.

    A forward pass may look at memory (`view` does); then nothing is turned. Asked once a model.
    """
    if not features.is_cpu or not any(isinstance(m, nn.Conv2d) for m in leaves):
        return False
    known = _LIKES.get(model)
    if known is None:
        training = model.training
        model.eval()  # a look draws no dropout
        try:
            known = _LIKES[model] = _same(model, leaves, features[:1])
        finally:
            model.train(training)
    return known


def _same(model: nn.Module, leaves: list[nn.Module], one: Tensor) -> bool:
    with torch.no_grad():
        expected, turning = model(one), Turning(leaves, Memory())
        try:
            got = model(one)
        except RuntimeError:
            return False
        finally:
            turning.close()
        return bool(torch.allclose(got, expected, rtol=1e-3, atol=1e-4, equal_nan=True))


def image_part(
    layer: nn.Conv2d, a: Tensor, d: Tensor, *, records: int, memory: Memory, biased: bool
) -> Part:
    """The share of a convolution of images, without groups, that is used once.

    Args:
        layer: Its weight is trained.
        a: What went in, in any order of memory.
        d: The gradient of what came out.
        records: Rows of one patient.
        memory: For intermediate results.
        biased: Whether its bias is trained.
    """
    last = d.is_contiguous(memory_format=_LAST) and not d.is_contiguous()
    rows, outputs, inputs = len(d), layer.out_channels, layer.in_channels
    kernel = layer.kernel_size
    size = inputs * math.prod(kernel)
    pixels = last and inputs >= _FEW  # patches pixel by pixel, not plane by plane
    patches = _patches(layer, a, d.shape[2:], memory, pixels=pixels)
    if last:
        d = d.permute(0, 2, 3, 1).reshape(rows, -1, outputs)
        left = patches.transpose(1, 2) if pixels else patches
        place = memory.take((layer, "gradients"), (rows, size, outputs), d)
        if pixels:  # large products, one a row: NumPy's take two thirds of the time of a batch's
            np.matmul(left.detach().numpy(), d.detach().numpy(), out=place.numpy())
            gradients = place
        else:
            gradients = torch.bmm(left, d, out=place)
        shape = (*kernel, inputs, outputs) if pixels else (inputs, *kernel, outputs)
        order = (3, 2, 0, 1) if pixels else (3, 0, 1, 2)
    else:
        d = d.reshape(rows, outputs, -1)
        place = memory.take((layer, "gradients"), (rows, outputs, size), d)
        gradients = torch.bmm(d, patches.transpose(1, 2), out=place)
        shape, order = (outputs, inputs, *kernel), (0, 1, 2, 3)
    gradients = sum_records(gradients, records)
    squared = squared_norms(gradients)
    summed = sum_records(d.sum(1 if last else 2), records) if biased else None
    if summed is not None:
        squared += squared_norms(summed)

    def weighted(factors: Tensor, into: Into) -> Sums:
        total = torch.mv(gradients.flatten(1).t(), factors).view(shape).permute(order)
        sums = {"weight": total if into is None else into["weight"].copy_(total)}
        if summed is not None:
            bias = torch.mv(summed.t(), factors)
            sums["bias"] = bias if into is None else into["bias"].copy_(bias)
        return sums

    return Part(squared, weighted)


def _patches(
    layer: nn.Conv2d, a: Tensor, places: torch.Size, memory: Memory, *, pixels: bool
) -> Tensor:
    """What each output saw: `(rows, positions, kernel * channels)`, or planes in `unfold`'s order.

    One copy in long runs; `unfold` copies number by number.
    """
    (down, right), (tall, wide) = _pair(layer.padding), a.shape[2:]
    rows, channels = a.shape[:2]
    tall, wide = tall + 2 * down, wide + 2 * right
    shape = (rows, tall, wide, channels) if pixels else (rows, channels, tall, wide)
    padded = memory.take((layer, "padded", shape[1:]), shape, a)  # nobody writes to its edges
    source = padded if not pixels else padded.permute(0, 3, 1, 2)
    _copied(a, source[:, :, down : tall - down, right : wide - right])
    s = source.stride()
    (i, j), (di, dj) = layer.stride, layer.dilation
    kernel, positions = math.prod(layer.kernel_size), math.prod(places)
    if pixels:
        windows = padded.as_strided(
            (rows, *places, *layer.kernel_size, channels),
            (s[0], i * s[2], j * s[3], di * s[2], dj * s[3], s[1]),
        )
        flat = (rows, positions, kernel * channels)
    else:
        windows = padded.as_strided(
            (rows, channels, *layer.kernel_size, *places),
            (s[0], s[1], di * s[2], dj * s[3], i * s[2], j * s[3]),
        )
        flat = (rows, channels * kernel, positions)
    out = memory.take((layer, "patches"), flat, a)
    _copied(windows, out.view(windows.shape))
    return out


def _pair(value: object) -> tuple[int, int]:
    if not (isinstance(value, tuple) and len(value) == 2):  # noqa: PLR2004 (height, width)
        raise TypeError("padding is two numbers; see `supported`")
    return value
