"""Small models on feature vectors, with initial parameters that every runtime agrees on."""

import itertools
import math
from typing import TYPE_CHECKING

from fedward.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

NAMES = ("logistic", "mlp")
_ARGS = {"logistic": (), "mlp": ("hidden", "seed")}
_LARGEST_HIDDEN = 4096


def build(name: str, *, num_features: int, **args: object) -> "nn.Sequential":
    """A model with one output, the log-odds.

    Args:
        name: "logistic", or "mlp" with one hidden layer of rectified units.
        num_features: Length of a feature vector.
        args: For "mlp": `hidden`, number of hidden units, 16 by default; `seed` of the initial
            parameters, 0 by default.

    Raises:
        ConfigError: There is no such model, or it does not take these arguments.
    """
    if name not in _ARGS:
        raise ConfigError(
            f'= "{name}" is not a model of this task; allowed: {", ".join(NAMES)}',
            file="study",
            key="[model] name",
        )
    for key in args:
        if key not in _ARGS[name]:
            raise ConfigError(
                f"is not an argument of {name}; allowed: {', '.join(_ARGS[name]) or 'none'}",
                file="study",
                key=f"[model.args] {key}",
            )
    if name == "logistic":
        return _sequential([num_features, 1], seed=None)
    hidden = _integer(args, "hidden", default=16, low=1, high=_LARGEST_HIDDEN)
    seed = _integer(args, "seed", default=0, low=0, high=2**63 - 1)
    return _sequential([num_features, hidden, 1], seed=seed)


def _integer(args: dict[str, object], key: str, *, default: int, low: int, high: int) -> int:
    value = args.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(
            f"= {value!r} is not allowed: a whole number from {low} to {high}",
            file="study",
            key=f"[model.args] {key}",
        )
    return value


def _sequential(sizes: list[int], *, seed: int | None) -> "nn.Sequential":
    """Linear layers with rectified units between; zeros with no seed, else He et al. (2015)."""
    import torch
    from torch import nn

    # A generator of its own: torch's global one neither decides the model nor is moved by it.
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        if layers:
            layers.append(nn.ReLU())
        with torch.random.fork_rng(devices=[]):
            layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.bias.zero_()
            if generator is None:
                layer.weight.zero_()
            else:
                layer.weight.normal_(0.0, math.sqrt(2 / inputs), generator=generator)
        layers.append(layer)
    return nn.Sequential(*layers)
