"""A task for tests that brings a trunk from public data, as a package of one's own would.

A task is any object with the members of `fedward.tasks.task.Task`; a study names this one as
`pretrained_task:PRETRAINED`. Its `model` gives the parameters at which every site starts, so what
public data taught is simply there, and costs nothing.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from fedward.tasks.heart_disease import SCHEMA
from fedward.tasks.tabular import BinaryTabularTask

HIDDEN = 6


class Pretrained(BinaryTabularTask):
    """Heart disease, with a first layer that somebody trained on patients who are public."""

    __slots__ = ()

    def model(self, name: str, **args: Any) -> nn.Module:
        """The task's model; the trunk of the perceptron is the public one."""
        model = super().model(name, **args)
        if name == "mlp":
            trunk = model.get_submodule("0")
            with torch.no_grad():
                for parameter, public in zip(trunk.parameters(), public_trunk(), strict=True):
                    parameter.copy_(torch.from_numpy(public))
        return model


def public_trunk() -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias, as they would be read from a safetensors file beside the package."""
    rng = np.random.default_rng(11)
    weight = rng.normal(size=(HIDDEN, 27)) / np.sqrt(27)
    return weight.astype(np.float32), rng.normal(size=HIDDEN).astype(np.float32)


PRETRAINED = Pretrained(name="pretrained", schema=SCHEMA)
