"""The job of `simulation.py`: scikit-learn's breast cancer data, an MLP or a logistic model.

The data set and the task as Fedward takes them ("breast_cancer:DATASET", "breast_cancer:TASK"),
and the same arrays for whoever else does the job. A contender reads them from the job's file, as
its peers do, and does not import scikit-learn for them.
"""

import math
import os
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.core.errors import ConfigError
from fedward.tasks.export import export_binary
from fedward.tasks.schema import Field, Schema
from fedward.tasks.tabular import BinaryTabularTask
from fedward.tasks.task import Fitted, Table

JOB_FILE = "FEDWARD_BENCHMARK_DATA"
"""Environment variable that names the job's `data.npz`."""

_SPREAD = 12.0  # standard deviations that the public ranges span on each side


@cache
def arrays() -> dict[str, NDArray[Any]]:
    """`train_x`, `train_y`, `test_x`, `test_y`: standardised by the training rows."""
    if JOB_FILE in os.environ:
        with np.load(os.environ[JOB_FILE]) as data:
            return {name: data[name] for name in ("train_x", "train_y", "test_x", "test_y")}
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import train_test_split

    x, y = load_breast_cancer(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=0.2, random_state=0, stratify=y
    )
    mean, std = train_x.mean(0), train_x.std(0)
    return {
        "train_x": ((train_x - mean) / std).astype(np.float32),
        "train_y": train_y.astype(np.int64),
        "test_x": ((test_x - mean) / std).astype(np.float32),
        "test_y": test_y.astype(np.int64),
    }


def make_model(name: str) -> nn.Module:
    """The model "mlp" (30-64-2) or "logistic" (30-1), with the same start for everybody."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"mlp": [30, 64, 2], "logistic": [30, 1]}[name]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        if layers:
            layers.append(nn.ReLU())
        layer = nn.Linear(inputs, outputs)
        for p in layer.parameters():
            bound = 1 / math.sqrt(inputs)
            with torch.no_grad():
                p.uniform_(-bound, bound, generator=generator)
        layers.append(layer)
    return nn.Sequential(*layers)


class _Dataset:
    PUBLIC_SIZES: ClassVar[dict[str, int]] = {"train": 455}

    def load(self, partition: str) -> Table:
        if partition != "train":
            raise ConfigError(f'= "{partition}" is not a partition', file="benchmark")
        data = arrays()
        columns = {f"x{i}": column.astype(np.float64) for i, column in enumerate(data["train_x"].T)}
        columns["malignant"] = data["train_y"].astype(np.float64)
        ids = tuple(f"{i:04d}" for i in range(len(data["train_y"])))
        return Table(source="breast-cancer", patient_ids=ids, columns=columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task(BinaryTabularTask):
    """Cross-entropy over two outputs, as the peers have it; one log-odds for the logistic model."""

    def model(self, name: str, **args: Any) -> nn.Module:
        if args:
            raise ConfigError("takes no arguments", file="benchmark", key="[model.args]")
        return make_model(name)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if outputs.shape[-1] == 1:
            return nn.functional.binary_cross_entropy_with_logits(
                outputs.reshape(-1), labels.to(outputs.dtype), reduction="none"
            )
        return nn.functional.cross_entropy(outputs, labels.long(), reduction="none")

    def probabilities(self, outputs: Tensor) -> Tensor:
        if outputs.shape[-1] == 1:
            return outputs.detach().reshape(-1).sigmoid()
        return outputs.detach().softmax(1)[:, 1]

    def export_onnx(self, model: nn.Module, fitted: Fitted | None) -> bytes:
        """Of two outputs only the difference matters: one log-odds."""
        *inner, last = model
        if last.out_features == 2:
            one = nn.Linear(last.in_features, 1)
            with torch.no_grad():
                one.weight.copy_(last.weight[1:] - last.weight[:1])
                one.bias.copy_(last.bias[1:] - last.bias[:1])
            model = nn.Sequential(*inner, one)
        return export_binary(model, self.preparation(fitted), name=self.name)


def _schema() -> Schema:
    numbers = [
        Field(
            name=f"x{i}",
            kind="number",
            description="a standardised measurement",
            allowed=(-1e6, 1e6),
            scaling=(-_SPREAD, _SPREAD),
            missing_indicator=False,
        )
        for i in range(30)
    ]
    label = Field(name="malignant", kind="flag", description="the outcome", role="label")
    return Schema(fields=(*numbers, label))


DATASET = _Dataset()
TASK = _Task(name="breast-cancer", schema=_schema(), gain=_SPREAD)
