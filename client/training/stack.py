"""Forward and backward passes through a stack of linear layers, without autograd.

For a perceptron autograd's own work is as long as the arithmetic of a batch of 64.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedward.client.training.parts import Call, Loss, Memory

Derivative = Callable[[Tensor, Tensor], Tensor]
_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid)


def derivative_of(loss: Loss) -> Derivative:
    """Of the summed loss by the outputs.

    The loss may carry it as an attribute `output_gradient(outputs, labels)`, which gives a new
    tensor; without it, autograd differentiates the loss alone.
    """

    def differentiate(outputs: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            losses = loss(outputs, labels)
            one_a_row(losses, outputs)
            return torch.autograd.grad(losses.sum(), outputs)[0]

    derivative: Derivative = getattr(loss, "output_gradient", differentiate)
    return derivative


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
    """One forward and backward pass: what went into each layer, what gradient came back.

    Args:
        model: One that is `stacked`.
        loss: One value an example; see `derivative_of`.
        leaves: The layers whose calls are asked for.
        memory: For what is held between the passes.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, leaves: Mapping[str, nn.Module], memory: Memory
    ) -> None:
        layers = list(model.children())
        self._layers = [m for m in layers if type(m) in (nn.Linear, *_ACTIVATIONS)]
        self._flattens = any(type(m) is nn.Flatten for m in layers)
        self._biased = {id(m) for m in layers if dict(m.named_parameters()).get("bias") is not None}
        self._derivative = derivative_of(loss)
        self._names = {id(layer): name for name, layer in leaves.items()}
        self._memory = memory

    def fits(self, features: Tensor) -> bool:
        """Whether the layers see rows, and no sequences."""
        return self._flattens or features.dim() == 2  # noqa: PLR2004 (rows, columns)

    def run(self, features: Tensor, labels: Tensor, mask: Tensor | None) -> dict[str, list[Call]]:
        """As `Captured.run`."""
        x = features.flatten(1) if self._flattens else features
        given: list[Tensor] = []
        for layer in self._layers:
            given.append(x)
            x = self._forward(layer, x)
        d = self._derivative(x, labels)
        if mask is not None:
            d = d * mask[:, None]
        calls: dict[str, list[Call]] = {}
        for number in range(len(self._layers) - 1, -1, -1):
            layer, a = self._layers[number], given[number]
            if not isinstance(layer, nn.Linear):
                _backward(layer, d, given[number + 1])
                continue
            name = self._names.get(id(layer))
            if name is not None:
                calls[name] = [(a, d)]
                if len(calls) == len(self._names):
                    break
            d = torch.mm(d, layer.weight, out=self._memory.take((layer, "back"), a.shape, a))
        return calls

    def _forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        match layer:
            case nn.Linear():
                out = self._memory.take((layer, "on"), (len(x), layer.out_features), x)
                if id(layer) in self._biased:
                    return torch.addmm(layer.bias, x, layer.weight.t(), out=out)
                return torch.mm(x, layer.weight.t(), out=out)
            case nn.ReLU():
                return x.relu_()
            case nn.Tanh():
                return x.tanh_()
            case _:
                return x.sigmoid_()


def _backward(layer: nn.Module, d: Tensor, y: Tensor) -> None:
    """Multiply `d` by the activation's derivative where it gave `y`."""
    match layer:
        case nn.ReLU():
            torch.ops.aten.threshold_backward.grad_input(d, y, 0, grad_input=d)
        case nn.Tanh():
            d.addcmul_(d * y, y, value=-1)
        case _:
            d.mul_(torch.addcmul(y, y, y, value=-1))
