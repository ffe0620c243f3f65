"""A binary task on a table: one row a patient, one outcome, yes or no."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedward.tasks import models, preparation
from fedward.tasks.losses import DifferentiatedLoss, binary_cross_entropy
from fedward.tasks.metrics import (
    binary_sums,
    calibration_of,
    coarse_histogram,
    summarise_binary,
    summarise_coarse,
)
from fedward.tasks.schema import Schema
from fedward.tasks.task import Examples, Fitted, Sums, Table

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class BinaryTabularTask:
    """Implements `Task` from a schema alone.

    Attributes:
        name: As a study names it.
        schema: Its fields; the label is a flag.
        gain: Multiplies every feature; chosen so that a gradient's norm is about 1.
    """

    name: str
    schema: Schema
    gain: float = 1.0

    @property
    def models(self) -> tuple[str, ...]:
        """What `model` can build; the first is the default."""
        return models.NAMES

    # Cross-entropy of log-odds of shape `(num_examples, 1)`, one value an example.
    loss: ClassVar[DifferentiatedLoss] = binary_cross_entropy

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Of the prepared features, in order."""
        return self.preparation(None).names

    def preparation(self, fitted: Fitted | None) -> preparation.Preparation:
        """The way from raw columns to features, as data."""
        return preparation.preparation(self.schema, fitted, gain=self.gain)

    def statistics(self, table: Table) -> Sums:
        """See `Task.statistics`, and `preparation.statistics` for the arrays."""
        return preparation.statistics(self.schema, table.columns)

    def fit(self, sums: Sums) -> Fitted:
        """See `Task.fit`: numbers are standardised."""
        return preparation.fit(self.schema, sums)

    def prepare(self, table: Table, fitted: Fitted | None) -> Examples:
        """See `Task.prepare`."""
        raw = np.stack([table.columns[f.name] for f in self.schema.features], axis=1)
        units = np.unique(np.array(table.patient_ids, dtype=np.str_), return_inverse=True)[1]
        return Examples(
            features=self.preparation(fitted).apply(raw),
            labels=table.columns[self.schema.label.name].astype(np.float32),
            units=units.astype(np.int64).reshape(-1),
        )

    def model(self, name: str, **args: Any) -> "nn.Module":
        """See `models.build`."""
        return models.build(name, num_features=self.preparation(None).num_features, **args)

    def probabilities(self, outputs: "Tensor") -> "Tensor":
        """Of the outcome, shape `(num_examples,)`."""
        return outputs.detach().reshape(-1).sigmoid()

    def metrics(self, outputs: "Tensor", labels: "Tensor") -> Sums:
        """See `metrics.binary_sums`."""
        return binary_sums(
            self.probabilities(outputs.double()).cpu().numpy(), labels.detach().cpu().numpy()
        )

    def summarise(self, sums: Sums) -> dict[str, float]:
        """See `metrics.summarise_binary`."""
        return summarise_binary(sums)

    def private_metrics(self, sums: Sums) -> Sums:
        """See `metrics.coarse_histogram`; one row a patient, so that a patient adds one."""
        return coarse_histogram(sums)

    def summarise_private(self, sums: Sums) -> dict[str, float]:
        """See `metrics.summarise_coarse`."""
        return summarise_coarse(sums)

    def calibration(self, sums: Sums) -> dict[str, Any]:
        """See `metrics.calibration_of`."""
        return calibration_of(sums)

    def export_onnx(self, model: "nn.Module", fitted: Fitted | None) -> bytes:
        """See `Task.export_onnx`."""
        from fedward.tasks.export import export_binary

        return export_binary(model, self.preparation(fitted), name=self.name)
