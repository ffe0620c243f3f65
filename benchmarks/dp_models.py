"""The models that `dp_training.py` times: one of each family, with random data."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedward.tasks.task import Examples

_WORDS, _LENGTH = 2000, 32
_TEXT_WORDS, _TEXT_LENGTH = 5000, 64


class Convolutional(nn.Module):
    """Two convolutions with group normalisation, on 28 x 28."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32)
        self.hidden, self.head = nn.Linear(1568, 64), nn.Linear(64, 11)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape (rows, 11)."""
        x = functional.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)
        x = functional.max_pool2d(torch.relu(self.norm2(self.conv2(x))), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


class Text(nn.Module):
    """The mean of word vectors, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(_TEXT_WORDS, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape (rows, 2)."""
        return self.head(self.words(x).mean(1))


class Block(nn.Module):
    """Attention and two linear layers, normalised first (Xiong et al., ICML 2020)."""

    def __init__(self, size: int = 64, heads: int = 4, inner: int = 128) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = (
            nn.LayerNorm(size),
            nn.Linear(size, 3 * size),
            nn.Linear(size, size),
        )
        self.norm2, self.up, self.down = (
            nn.LayerNorm(size),
            nn.Linear(size, inner),
            nn.Linear(inner, size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The shape of `x`."""
        rows, steps, size = x.shape
        parts = self.qkv(self.norm1(x)).reshape(rows, steps, 3, self.heads, size // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(size // self.heads), -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(rows, steps, size))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two blocks on 32 words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(_WORDS, 64), nn.Embedding(_LENGTH, 64)
        self.block1, self.block2, self.head = Block(), Block(), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape (rows, 2)."""
        places = torch.arange(_LENGTH).repeat(x.shape[0], 1)
        h = self.words(x) + self.places(places)
        return self.head(self.block2(self.block1(h)).mean(1))


class Recurrent(nn.Module):
    """A GRU on 32 words."""

    def __init__(self, cell: Callable[..., nn.Module] = nn.GRU) -> None:
        super().__init__()
        self.words, self.cell = nn.Embedding(_WORDS, 32), cell(32, 64, batch_first=True)
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of shape (rows, 2)."""
        return self.head(self.cell(self.words(x))[0][:, -1])


@dataclass(frozen=True, slots=True)
class Family:
    """A model and the data it takes.

    Attributes:
        build: A new model with random parameters.
        opacus: The model as Opacus wants it.
        shape: Of one record; whole numbers below `words` if that is above 0.
        classes: Number of labels.
        words: Size of the vocabulary, or 0.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int = 2
    words: int = 0
    opacus: Callable[[], nn.Module] | None = None

    def examples(self, rows: int) -> Examples:
        """Random records, each of a patient of its own."""
        rng = np.random.default_rng(0)
        features: NDArray[np.generic]
        if self.words:
            features = rng.integers(0, self.words, (rows, *self.shape))
        else:
            features = rng.standard_normal((rows, *self.shape)).astype(np.float32)
        return Examples(features, rng.integers(0, self.classes, rows), np.arange(rows))


def _perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)
    )


def _opacus_recurrent() -> nn.Module:
    from opacus.layers import DPGRU

    return Recurrent(DPGRU)


FAMILIES = {
    "logistic": Family(lambda: nn.Linear(30, 2), (30,)),
    "mlp": Family(_perceptron, (64,)),
    "cnn": Family(Convolutional, (1, 28, 28), classes=11),
    "embedding": Family(Text, (_TEXT_LENGTH,), words=_TEXT_WORDS),
    "transformer": Family(Transformer, (_LENGTH,), words=_WORDS),
    "gru": Family(Recurrent, (_LENGTH,), words=_WORDS, opacus=_opacus_recurrent),
}
