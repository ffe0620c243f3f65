"""A task for tests whose model has layers that no built-in one has: heart disease, convolved."""

from typing import Any

import torch
from torch import nn

from fedward.tasks.heart_disease import SCHEMA
from fedward.tasks.tabular import BinaryTabularTask


class Convolutional(BinaryTabularTask):
    """Heart disease by a network over its features; nobody wrote an ONNX form of it."""

    __slots__ = ()

    def model(self, name: str, **args: Any) -> nn.Module:
        """A small convolutional network, whatever the name."""
        del name, args
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(
                *(nn.Unflatten(1, (1, 27)), nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(100, 1)),
            )


CONVOLUTIONAL = Convolutional(name="convolutional", schema=SCHEMA)
