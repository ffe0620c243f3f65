"""A model's parameters as one flat vector, the form in which they travel, and back."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn


def to_vector(model: "nn.Module") -> NDArray[np.float32]:
    """The trained parameters in the model's own order, shape `(num_parameters,)`; a copy.

    Frozen ones (`requires_grad` is False) are not among them: every site has them already.
    """
    pieces = [p.detach().cpu().numpy().reshape(-1) for p in model.parameters() if p.requires_grad]
    if not pieces:
        return np.zeros(0, dtype=np.float32)
    return np.concatenate(pieces).astype(np.float32)


def from_vector(model: "nn.Module", vector: NDArray[np.float32]) -> None:
    """Set the trained parameters from a flat vector, in place.

    Raises:
        ValueError: The vector's shape or type is not that of the model's trained parameters.
    """
    _set([p for p in model.parameters() if p.requires_grad], vector)


def _set(parameters: "Sequence[nn.Parameter]", vector: NDArray[np.float32]) -> None:
    import torch

    expected = sum(p.numel() for p in parameters)
    if vector.shape != (expected,) or vector.dtype != np.float32:
        raise ValueError(
            f"the model has {expected} float32 parameters, the vector is "
            f"{vector.dtype} of shape {vector.shape}"
        )
    # One copy: what came over a wire is read-only, which torch would not take.
    pieces = torch.split(torch.from_numpy(vector.copy()), [p.numel() for p in parameters])
    with torch.no_grad():
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))


def to_named(model: "nn.Module") -> dict[str, NDArray[np.float32]]:
    """All parameters by name, frozen ones too, copies: what a release stores."""
    return {
        name: parameter.detach().cpu().numpy().astype(np.float32, copy=True)
        for name, parameter in model.named_parameters()
    }


def from_named(model: "nn.Module", named: Mapping[str, NDArray[Any]]) -> None:
    """Set all parameters from arrays by name, in place: `to_named` backwards.

    Raises:
        ValueError: Names, shapes or types are not those of the model, or a number is not finite.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: array.shape for name, array in named.items() if array.dtype == np.float32}
    if given != expected or len(named) != len(expected):
        raise ValueError(f"the model has float32 parameters {expected}; given were {given}")
    if not all(np.isfinite(array).all() for array in named.values()):
        raise ValueError("a parameter is not finite")
    pieces = [named[name].reshape(-1) for name in expected]
    _set(list(model.parameters()), np.concatenate(pieces) if pieces else np.zeros(0, np.float32))
