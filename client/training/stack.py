"""Forward and backward passes through a stack of linear layers on a CPU, without autograd.

For a perceptron, autograd's own work and torch's calls are as long as the arithmetic of a batch of
64. All here is NumPy's: its calls take a third of the time, and its matrix products are as quick.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.client.training.parts import STABILITY, Call, Loss
from fedward.client.training.sampler import Batch
from fedward.tasks.losses import OutputGradient

Array = NDArray[np.float32]

_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid)


def derivative_of(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """Of the summed loss by the outputs.

    The loss may carry it as an attribute `output_gradient(outputs, labels)`, of arrays, which gives
    a new one (see `DifferentiatedLoss`); without it, autograd differentiates the loss alone.
    """
    own: OutputGradient | None = getattr(loss, "output_gradient", None)

    def derive(outputs: Tensor, labels: Tensor) -> Tensor:
        if own is not None and outputs.is_cpu and outputs.dtype == torch.float32:
            with np.errstate(all="ignore"):
                found = own(outputs.detach().numpy(), labels.numpy())
            return torch.from_numpy(found).to(outputs.dtype)
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            losses = loss(outputs, labels)
            one_a_row(losses, outputs)
            return torch.autograd.grad(losses.sum(), outputs)[0]

    return derive


def one_a_row(losses: Tensor, rows: Tensor) -> None:
    """Refuse a loss that is already averaged or summed.

    Raises:
        ValueError: It does not have one value for each of `rows`.
    """
    if losses.shape != rows.shape[:1]:
        raise ValueError(
            f"the loss gives one value an example, so shape ({len(rows)},), not "
            f"{tuple(losses.shape)}"
        )


def stack_of(
    model: nn.Module,
    loss: Loss,
    leaves: Mapping[str, nn.Module],
    into: Mapping[str, Mapping[str, Tensor]],
) -> "Stack | None":
    """What computes the model without autograd, if it is `stacked`.

    Args:
        model: Any.
        loss: One value an example.
        leaves: Its layers with parameters to train.
        into: Where sums go, by layer and parameter.
    """
    if not stacked(model, leaves):
        return None
    layers = list(model.children())
    return Stack(
        [m for m in layers if type(m) in (nn.Linear, *_ACTIVATIONS)],
        loss,
        into,
        {leaf: name for name, leaf in leaves.items()},
        flattens=any(type(m) is nn.Flatten for m in layers),
    )


def stacked(model: nn.Module, leaves: Mapping[str, nn.Module]) -> bool:
    """Whether the model is a sequence that `Stack` computes, and nobody listens to it.

    It is linear layers with at most one activation between two of them, and none at the end: so
    an activation may overwrite what the linear layer before it gave.

    Args:
        model: Any.
        leaves: Its layers with parameters to train.
    """
    if type(model) is not nn.Sequential or any(_hooked(m) for m in model.modules()):
        return False
    layers = [layer for layer in model if type(layer) is not nn.Identity]
    if layers and isinstance(layers[0], nn.Flatten):
        if (layers[0].start_dim, layers[0].end_dim) != (1, -1):
            return False
        layers.pop(0)
    linear = [type(layer) is nn.Linear for layer in layers]
    known = all(type(layer) in (nn.Linear, *_ACTIVATIONS) for layer in layers)
    return (
        known
        and len(leaves) > 0
        and len({id(layer) for layer in layers}) == len(layers)
        and linear[:1] == linear[-1:] == [True]
        and all(one or other for one, other in pairwise(linear))
    )


def _hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


class Stack:
    """Clips what linear layers and the activations between them make of a batch.

    Args:
        layers: In order: each `nn.Linear`, or an activation after one.
        loss: One value an example; see `derivative_of`.
        into: Where the sums of trained parameters go, by layer's name and parameter's.
        names: Of the layers with parameters to train.
        flattens: Whether a record is made a row first.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        loss: Loss,
        into: Mapping[str, Mapping[str, Tensor]],
        names: Mapping[nn.Module, str],
        *,
        flattens: bool,
    ) -> None:
        parameters = [p for layer in layers for p in layer.parameters()]
        self._arrays = all(p.is_cpu and p.dtype == torch.float32 for p in parameters)
        if not self._arrays:
            return
        self._layers: list[_Layer] = []
        for layer in layers:
            if isinstance(layer, nn.Linear):
                name = names.get(layer)
                self._layers.append(_Layer(layer, name, {} if name is None else into[name]))
            else:
                self._layers[-1].activation = type(layer)
        # Below it nothing is trained.
        self._first = next(n for n, layer in enumerate(self._layers) if layer.name is not None)
        self._own: OutputGradient | None = getattr(loss, "output_gradient", None)
        self._derivative = derivative_of(loss)
        self._flattens = flattens

    def fits(self, batch: Batch) -> bool:
        """Whether the layers see rows, and no sequences, in memory that is NumPy's too."""
        x = batch.features
        if not self._arrays or not x.is_cpu or x.dtype != torch.float32:
            return False
        return self._flattens or x.dim() == 2  # noqa: PLR2004 (rows, columns)

    def clip(self, batch: Batch, clip_norm: float) -> tuple[Tensor, bool]:
        """Put the sums of clipped gradients in their places.

        Returns:
            Squared norms, of one row each, and whether all are finite; if not, the sums are not.
        """
        with np.errstate(all="ignore"):
            passed = self._pass(batch)
            squared = functools.reduce(
                np.add, [layer.squared_norms(a, d) for layer, a, d in passed]
            )
            finite = math.isfinite(squared.sum())
            # min(1, C / (norm + 1e-6)) is C / max(norm + 1e-6, C).
            factors = np.sqrt(squared)
            factors += STABILITY
            np.maximum(factors, clip_norm, out=factors)
            np.divide(clip_norm, factors, out=factors)
            for layer, a, d in passed:
                layer.add_up(a, d, factors)
        return torch.from_numpy(squared), finite

    def calls(self, batch: Batch) -> dict[str, list[Call]]:
        """As `Captured.run`."""
        with np.errstate(all="ignore"):
            return {
                str(layer.name): [Call(torch.from_numpy(a), torch.from_numpy(d))]
                for layer, a, d in self._pass(batch)
            }

    def _pass(self, batch: Batch) -> "list[tuple[_Layer, Array, Array]]":
        """Layers to train, from the last one, what went in and the gradient of what came out."""
        x: Array = batch.features.numpy()
        if self._flattens:
            x = x.reshape(len(x), -1)
        given: list[Array] = []
        for layer in self._layers:
            given.append(x)
            x = layer.forward(x)
        if self._own is not None:
            derived = self._own(x, batch.labels.numpy())
        else:
            derived = self._derivative(torch.from_numpy(x), batch.labels).numpy()
        # Strides of its own, or another type, are the loss's business.
        d: Array = np.ascontiguousarray(derived, dtype=np.float32)
        if batch.mask is not None:
            d = d * batch.mask.numpy()[:, None]
        passed: list[tuple[_Layer, Array, Array]] = []
        for number in range(len(self._layers) - 1, self._first - 1, -1):
            layer = self._layers[number]
            if layer.name is not None:
                passed.append((layer, given[number], d))
            if number > self._first:
                d = layer.backward(d)
                _undo(self._layers[number - 1].activation, d, given[number])
        return passed


class _Layer:
    """A linear layer and the activation behind it, in arrays that share its memory.

    Attributes:
        name: None if nothing of it is trained.
        activation: Its class, or None.
    """

    def __init__(self, linear: nn.Linear, name: str | None, into: Mapping[str, Tensor]) -> None:
        self.name = name
        self.activation: type[nn.Module] | None = None
        self._linear = linear
        self._at = -1
        self._weight_sum, self._bias_sum = (
            into[own].numpy() if own in into else None for own in ("weight", "bias")
        )
        self._out = self._back = np.empty((0, 0), np.float32)

    def forward(self, a: Array) -> Array:
        """What comes out, in memory that the next batch overwrites."""
        linear = self._linear
        if linear.weight.data_ptr() != self._at:  # a session moves parameters
            self._at = linear.weight.data_ptr()
            self._weight: Array = linear.weight.detach().numpy()
            bias: Tensor | None = linear.bias
            self._bias: Array | None = None if bias is None else bias.detach().numpy()
        if len(a) > len(self._out):
            rows = len(a) + len(a) // 8  # batches differ
            self._out = np.empty((rows, linear.out_features), np.float32)
            self._back = np.empty((rows, linear.in_features), np.float32)
        out: Array = np.matmul(a, self._weight.T, out=self._out[: len(a)])
        if self._bias is not None:
            out += self._bias
        if self.activation is nn.ReLU:
            torch.from_numpy(out).relu_()
        elif self.activation is nn.Tanh:
            np.tanh(out, out=out)
        elif self.activation is nn.Sigmoid:
            np.negative(out, out=out)
            np.exp(out, out=out)
            out += 1
            np.reciprocal(out, out=out)
        return out

    def backward(self, d: Array) -> Array:
        """The gradient of what went in."""
        back: Array = np.matmul(d, self._weight, out=self._back[: len(d)])
        return back

    def squared_norms(self, a: Array, d: Array) -> Array:
        """Of each row's gradient, which is the outer product of `d` and `a`."""
        squared: Array = np.vecdot(d, d)
        if self._weight_sum is not None:
            length: Array = np.vecdot(a, a)
            if self._bias_sum is not None:
                length += 1
            squared *= length
        return squared

    def add_up(self, a: Array, d: Array, factors: Array) -> None:
        """Put the sums of the rows' gradients, times `factors`, in their places; `d` is lost."""
        if self._bias_sum is not None:
            np.matmul(factors, d, out=self._bias_sum)
        if self._weight_sum is not None:
            d *= factors[:, None]
            np.matmul(d.T, a, out=self._weight_sum)


def _undo(activation: type[nn.Module] | None, d: Array, y: Array) -> None:
    """Multiply `d` by the activation's derivative where it gave `y`."""
    if activation is nn.ReLU:
        one, other = torch.from_numpy(d), torch.from_numpy(y)
        torch.ops.aten.threshold_backward.grad_input(one, other, 0, grad_input=one)
    elif activation is nn.Tanh:
        d *= 1 - y * y
    elif activation is nn.Sigmoid:
        d *= y * (1 - y)
