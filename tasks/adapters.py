"""Parameter-efficient training: low-rank adapters on frozen linear layers.

Fewer trained parameters mean less noise: its norm grows with the square root of their number.
A frozen trunk needs nothing but `requires_grad_(False)`; such parameters are outside update,
clipping and noise.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A frozen linear layer and a trained correction of low rank.

    Hu et al., ICLR 2022, section 4.1: `W x + b + (scale / rank) B A x`, with `B` zero at first.

    Args:
        layer: Kept as it is and frozen.
        rank: Of the correction, >= 1.
        scale: The paper's alpha.
        seed: Of the initial `A`; the same on every site.
    """

    def __init__(self, layer: nn.Linear, *, rank: int, scale: float, seed: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is 1 or more, not {rank}")
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        self._factor = scale / rank
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            bound = 1 / math.sqrt(layer.in_features)
            self.down.weight.uniform_(-bound, bound, generator=generator)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, corrected."""
        corrected: Tensor = self.layer(x) + self.up(self.down(x)) * self._factor
        return corrected

    def merged(self) -> nn.Linear:
        """One linear layer that does the same, to be published."""
        layer = nn.Linear(
            self.layer.in_features, self.layer.out_features, bias=self.layer.bias is not None
        )
        with torch.no_grad():
            change = self.up.weight @ self.down.weight
            layer.weight.copy_(self.layer.weight + change * self._factor)
            if self.layer.bias is not None:
                layer.bias.copy_(self.layer.bias)
        return layer


def add_adapters(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    scale: float = 8.0,
    seed: int = 0,
    freeze_rest: bool = True,
) -> None:
    """Put a trained `LowRank` around the linear layers of these names, and freeze the model.

    Args:
        model: Changed in place.
        names: As in `model.named_modules()`.
        rank: Of the corrections.
        scale: The paper's alpha.
        seed: Of their initial parameters.
        freeze_rest: Freeze the layers without a correction, too.

    Raises:
        ValueError: A name is not that of a linear layer inside the model.
    """
    modules = dict(model.named_modules())
    wanted = list(names)
    for name in wanted:
        if not name or not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"{name!r} is not a linear layer inside the model")
    if freeze_rest:
        model.requires_grad_(False)
    for number, name in enumerate(wanted):
        layer = modules[name]
        if isinstance(layer, nn.Linear):
            adapter = LowRank(layer, rank=rank, scale=scale, seed=seed + number)
            _replace(model, name, adapter)


def merge_adapters(model: nn.Module) -> None:
    """Put one linear layer, that does the same, in the place of each `LowRank`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRank):
            _replace(model, name, module.merged())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
