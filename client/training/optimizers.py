"""SGD, Adam and AdamW on one flat vector, in place.

The rules are those of `torch.optim` (which is the oracle in the tests), element by element,
so that they also serve stacked vectors of any shape; `torch.optim`'s own bookkeeping costs
more than a whole step of a logistic regression.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedward.client.training.plan import Optimizer

# Up to this many numbers, calls of torch cost more than what they compute, and NumPy's less.
_SMALL = 4096
_Arrays = tuple[NDArray[np.float32], NDArray[np.float32] | None]
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam


class FlatOptimizer:
    """Turns released gradients into steps.

    Args:
        parameters: Any shape; changed in place by `step`.
        optimizer: Which rule.
        momentum: Of `sgd`.
        weight_decay: Decoupled for `adamw`, else added to the gradient.
    """

    def __init__(
        self, parameters: Tensor, *, optimizer: Optimizer, momentum: float, weight_decay: float
    ) -> None:
        self._parameters = parameters
        self._kind = optimizer
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._steps = 0
        names: tuple[str, ...] = ("first", "second")
        if optimizer == "sgd":
            names = ("momentum",) if momentum else ()
        self._state = {name: torch.zeros_like(parameters) for name in names}
        self._arrays = self._small_arrays()

    def step(self, gradient: Tensor, *, learning_rate: float, scale: float = 1.0) -> None:
        """One step down `scale` times `gradient`, which may be overwritten."""
        parameters = self._parameters
        self._steps += 1
        if self._kind == "sgd" and not self._weight_decay:
            if self._arrays is not None:
                _step_small(self._arrays, gradient.numpy(), self._momentum, learning_rate, scale)
                return
            if self._momentum and scale > 0 and parameters.is_cpu and gradient.is_contiguous():
                self._step_fused(gradient, learning_rate=learning_rate, scale=scale)
                return
            if self._momentum:
                gradient = self._state["momentum"].mul_(self._momentum).add_(gradient, alpha=scale)
                scale = 1.0
            parameters.add_(gradient, alpha=-learning_rate * scale)
            return
        if scale != 1:
            gradient.mul_(scale)
        if self._weight_decay:
            if self._kind == "adamw":
                parameters.mul_(1 - learning_rate * self._weight_decay)
            else:
                gradient.add_(parameters, alpha=self._weight_decay)
        if self._kind == "sgd":
            if self._momentum:
                gradient = self._state["momentum"].mul_(self._momentum).add_(gradient)
            parameters.add_(gradient, alpha=-learning_rate)
            return
        first = self._state["first"].lerp_(gradient, 1 - _BETA1)
        second = self._state["second"]
        second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        scale = (1 - _BETA2**self._steps) ** 0.5
        denominator = (second.sqrt() / scale).add_(_EPS)
        parameters.addcdiv_(first, denominator, value=-learning_rate / (1 - _BETA1**self._steps))

    def _step_fused(self, gradient: Tensor, *, learning_rate: float, scale: float) -> None:
        """SGD with momentum in one pass over memory, which is what it costs."""
        torch._fused_sgd_(
            [self._parameters],
            [gradient],
            [self._state["momentum"]],
            weight_decay=0.0,
            momentum=self._momentum,
            lr=learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # from a momentum of zeros that is the same
            grad_scale=torch.tensor(1 / scale),
        )

    def _small_arrays(self) -> _Arrays | None:
        """Parameters and momentum as arrays, where they are small; they share their memory."""
        p = self._parameters
        if self._kind != "sgd" or self._weight_decay or p.numel() > _SMALL or not p.is_cpu:
            return None
        momentum = self._state.get("momentum")
        return p.numpy(), None if momentum is None else momentum.numpy()

    def keep(self, rows: int) -> None:
        """Go on with the first `rows` rows of stacked parameters alone."""
        self._parameters = self._parameters[:rows]
        self._state = {name: value[:rows] for name, value in self._state.items()}
        self._arrays = self._small_arrays()

    def state(self) -> dict[str, NDArray[np.float32]]:
        """What a later `restore` needs, as arrays."""
        return {name: value.detach().cpu().numpy().copy() for name, value in self._state.items()}

    def restore(self, state: Mapping[str, NDArray[np.float32]], *, steps: int) -> None:
        """Go on where `state` was taken, after `steps` steps.

        Raises:
            ValueError: The state is of another optimizer or another model.
        """
        if set(state) != set(self._state):
            raise ValueError(f"state has {sorted(state)}, expected {sorted(self._state)}")
        for name, value in state.items():
            if value.shape != tuple(self._state[name].shape):
                raise ValueError(f"state {name} is of another model")
            self._state[name].copy_(torch.from_numpy(value))
        self._steps = steps


def _step_small(
    arrays: _Arrays,
    gradient: NDArray[np.float32],
    keep: float,
    learning_rate: float,
    scale: float,
) -> None:
    """SGD without weight decay; `keep` is the momentum."""
    parameters, momentum = arrays
    gradient *= scale
    if momentum is None:
        gradient *= learning_rate
    else:
        momentum *= keep
        momentum += gradient
        np.multiply(momentum, learning_rate, out=gradient)
    parameters -= gradient
