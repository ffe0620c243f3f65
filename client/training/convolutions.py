"""Convolutions on a CPU: memory laid out as its kernels like it, and gradients of every record.

oneDNN convolves, and torch pools, several times faster where the channels of a pixel stand
together ("channels last"); torch's group normalisation is several times faster where they do not.
The layers that book-keeping listens to turn what passes through them over, which changes where
numbers stand and no number.
"""

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.client.training.parts import Into, Memory, Part, Sums, squared_norms, sum_records
from fedward.privacy.mechanisms.compiled import compiled

Array = NDArray[np.float32]

_LAST = torch.channels_last
_IMAGES = 4  # dimensions: rows, channels, height, width
_FEW = 8  # channels, below which patches are made plane by plane
_LIKES: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


class Turning:
    """Hooks that turn what passes through layers over.

    Args:
        memory: For what nobody but a layer reads.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def before(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What goes in: channels last for convolutions, first for normalisation."""
        x = inputs[0]
        if isinstance(layer, nn.Conv2d) and x.dim() == _IMAGES:
            x = _channels_last(x)
        elif isinstance(layer, nn.GroupNorm) and x.dim() == _IMAGES and not x.is_contiguous():
            x = _turn(x, False, self._memory, (layer, "in"))
        return (x, *inputs[1:])

    def after(self, layer: nn.Module, output: Tensor) -> Tensor:
        """What goes on: channels last, for the pooling that may follow."""
        if isinstance(layer, nn.GroupNorm) and output.dim() == _IMAGES:
            return _turn(output, True, self._memory, (layer, "out"))
        return output


class _Turned(torch.autograd.Function):
    """The same numbers in another order in memory; gradients come back in the order before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: bool, memory: Memory, key: object) -> Tensor:
        ctx.last, ctx.memory, ctx.key = last, memory, key
        # What goes on may be changed in place, which a view of held memory may not.
        if last:
            return _copied(x, torch.empty_like(x, memory_format=_LAST))
        return _first(x, memory, key)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        key = (ctx.key, "back")
        back = _first(d, ctx.memory, key) if ctx.last else _last(d, ctx.memory, key)
        return back, None, None, None


_turn: Callable[..., Tensor] = _Turned.apply


def _first(x: Tensor, memory: Memory, key: object) -> Tensor:
    if x.is_contiguous():
        return x.view_as(x)
    return _copied(x, memory.take(key, x.shape, x))


def _last(x: Tensor, memory: Memory, key: object) -> Tensor:
    if x.is_contiguous(memory_format=_LAST):
        return x
    rows, channels, tall, wide = x.shape
    return _copied(x, memory.take(key, (rows, tall, wide, channels), x).permute(0, 3, 1, 2))


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
        expected, turning = model(one), Turning(Memory())
        handles = [m.register_forward_pre_hook(turning.before) for m in leaves]
        handles += [
            m.register_forward_hook(lambda m, _, out: turning.after(m, out)) for m in leaves
        ]
        try:
            got = model(one)
        except RuntimeError:
            return False
        finally:
            for handle in handles:
                handle.remove()
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


@compiled(
    "void(float32[:, :, :, ::1], float32[:, :, ::1], float64, float32[:, ::1], float32[:, ::1])",
    any_order=True,
)
def add_pixels(a: Array, d: Array, epsilon: float, product: Array, plain: Array) -> None:
    """What group normalisation (Wu and He, ECCV 2018, section 3.1) gives to its parameters.

    Args:
        a: What went in, shape `(rows, groups, channels of a group, pixels)`.
        d: The gradient of what came out, shape `(rows, channels, pixels)`.
        epsilon: Added to variances.
        product: Overwritten with the sums over pixels of `d` times the normalised `a`, shape
            `(rows, channels)`.
        plain: Overwritten with those of `d`, of the same shape.
    """
    rows, groups, channels, pixels = a.shape
    numbers = np.float32(channels * pixels)
    for row in range(rows):
        for group in range(groups):
            total = np.float32(0)
            for channel in range(channels):
                for pixel in range(pixels):
                    total += a[row, group, channel, pixel]
            mean = total / numbers
            squares = np.float32(0)
            for channel in range(channels):
                for pixel in range(pixels):
                    apart = a[row, group, channel, pixel] - mean
                    squares += apart * apart
            per_deviation = np.float32(1 / math.sqrt(squares / numbers + epsilon))
            for channel in range(channels):
                at = group * channels + channel
                with_normal, alone = np.float32(0), np.float32(0)
                for pixel in range(pixels):
                    gradient = d[row, at, pixel]
                    with_normal += (a[row, group, channel, pixel] - mean) * gradient
                    alone += gradient
                product[row, at] = with_normal * per_deviation
                plain[row, at] = alone
