"""Tasks for tests whose models have layers that no built-in one has: heart disease, oddly."""

from typing import Any

import torch
from torch import nn

from fedward.tasks.heart_disease import SCHEMA
from fedward.tasks.tabular import BinaryTabularTask
from fedward.tasks.task import Fitted


class Normalised(BinaryTabularTask):
    """Heart disease with batch normalisation: a record's gradient depends on the others'."""

    __slots__ = ()

    def model(self, name: str, **args: Any) -> nn.Module:
        """A perceptron with batch normalisation, whatever the name."""
        del name, args
        return nn.Sequential(nn.Linear(27, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))

    def export_onnx(self, model: nn.Module, fitted: Fitted | None) -> bytes:
        """Of the layers that have an ONNX form."""
        kept = [layer for layer in model.children() if not isinstance(layer, nn.BatchNorm1d)]
        return super().export_onnx(nn.Sequential(*kept), fitted)


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


NORMALISED = Normalised(name="normalised", schema=SCHEMA)
CONVOLUTIONAL = Convolutional(name="convolutional", schema=SCHEMA)
