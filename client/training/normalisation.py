"""Group normalisation of images whose channels stand together, forwards and back.

torch's own (Wu and He, ECCV 2018, section 3.1) is several times faster where channels stand apart,
and turning every image over on the way in and out, twice, costs more than normalising it. What its
backward pass sums up over pixels is what book-keeping asks of the layer: here it is kept by row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class PixelSums:
    """What one use of a layer adds to the gradients of its weight and bias, row by row.

    Args:
        apart: What went in, less its group's mean, shape `(rows, pixels, channels)`.
        inverse: One over its group's standard deviation, shape `(rows, channels)`.
        scratch: Contiguous memory of the size of `apart`.
    """

    def __init__(self, apart: Tensor, inverse: Tensor, scratch: Tensor) -> None:
        self.apart, self.inverse, self._scratch = apart, inverse, scratch
        self._known: tuple[Tensor, Tensor] | None = None

    def of(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over pixels of what was normalised, times `d`, and of `d`.

        Args:
            d: The gradient of what came out, which is the same whenever this is asked; shape
                `(rows, channels, height, width)`.

        Returns:
            Two of shape `(rows, channels)`.
        """
        if self._known is None:
            pixels = _pixels(d)
            product = torch.mul(pixels, self.apart, out=self._scratch.view(pixels.shape)).sum(1)
            self._known = product * self.inverse, pixels.sum(1)
        return self._known


def normalised(layer: nn.GroupNorm, x: Tensor, scratch: Tensor) -> tuple[Tensor, PixelSums]:
    """What the layer makes of `x`, and what its parameters' gradients can be had from.

    Args:
        layer: With a weight and a bias.
        x: Shape `(rows, channels, height, width)`.
        scratch: Contiguous memory of the size of `x`, for this and the backward pass.

    Returns:
        The output, channels last, and sums that the backward pass works out on its way.
    """
    groups = layer.num_groups
    with torch.no_grad():
        pixels = _pixels(x)
        apart = pixels - _group_means(pixels.mean(1), groups)[:, None]
        squares = torch.mul(apart, apart, out=scratch.view(apart.shape))
        inverse = torch.rsqrt(_group_means(squares.mean(1), groups) + layer.eps)
    sums = PixelSums(apart, inverse, scratch)
    return _normalise(x, layer.weight, layer.bias, sums, groups), sums


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (torch passes no keywords)
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sums: PixelSums, groups: int
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.groups, ctx.sums = groups, sums
        # What goes on may be changed in place, which a view may not.
        out = torch.empty_like(x, memory_format=torch.channels_last)
        place = out.permute(0, 2, 3, 1).view(sums.apart.shape)
        torch.addcmul(bias, sums.apart, (sums.inverse * weight)[:, None], out=place)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        apart, inverse = ctx.sums.apart, ctx.sums.inverse
        number = d.shape[2] * d.shape[3]
        product, plain = ctx.sums.of(d)
        # What goes back is a sum of what came, of what was normalised, and of a constant.
        slope = _group_means(product * weight, ctx.groups) / -number
        level = _group_means(plain * weight, ctx.groups) / -number
        back = torch.addcmul((inverse * level)[:, None], apart, (inverse**2 * slope)[:, None])
        back.addcmul_(_pixels(d), (inverse * weight)[:, None])
        rows, channels, tall, wide = d.shape
        back = back.view(rows, tall, wide, channels).permute(0, 3, 1, 2)
        return back, product.sum(0), plain.sum(0), None, None


_normalise: Callable[..., Tensor] = _Normalised.apply


def _group_means(values: Tensor, groups: int) -> Tensor:
    """Of shape `(rows, channels)`, for each channel the mean over its group."""
    rows, channels = values.shape
    means = values.view(rows, groups, -1).mean(2, keepdim=True)
    return means.expand(-1, -1, channels // groups).reshape(rows, channels)


def _pixels(x: Tensor) -> Tensor:
    """An image as `(rows, pixels, channels)`; a view where its channels stand together."""
    return x.detach().permute(0, 2, 3, 1).flatten(1, 2).contiguous()
