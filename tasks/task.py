"""The seam between a clinical task and everything that trains, evaluates and publishes it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedward.tasks.schema import Schema

if TYPE_CHECKING:
    from torch import Tensor, nn

Sums = Mapping[str, NDArray[np.float64]]
"""Arrays that add up over sites: the only form in which a site's data may be summarised."""

Fitted = Mapping[str, Any]
"""What preparation learned from sums, as JSON values; it travels with the study and the release."""


@dataclass(frozen=True, slots=True)
class Table:
    """A site's patients, validated, in the schema's units.

    Attributes:
        source: What errors call it: a file, or a data set and its partition.
        patient_ids: One a row. Never leaves the site.
        columns: One array of shape `(num_rows,)` for each field of the schema. NaN is missing;
            a category is the index into the field's categories, a flag is 0 or 1.
    """

    source: str
    patient_ids: tuple[str, ...]
    columns: Mapping[str, NDArray[np.float64]]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.patient_ids)

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> "Table":
        """The table of these rows, in this order."""
        index = np.asarray(rows, dtype=np.intp)
        return Table(
            source=self.source,
            patient_ids=tuple(self.patient_ids[i] for i in index),
            columns={name: values[index] for name, values in self.columns.items()},
        )


@dataclass(frozen=True, slots=True)
class Examples:
    """What a model trains on.

    Attributes:
        features: Shape `(num_examples, num_features)`.
        labels: Shape `(num_examples,)`; float32 for probabilities, int64 for classes.
        units: Shape `(num_examples,)`, from 0: which patient an example is of.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.float32] | NDArray[np.int64]
    units: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def num_units(self) -> int:
        """Number of patients."""
        return int(self.units.max()) + 1 if len(self.units) else 0

    def by_record(self) -> "Examples":
        """These examples, each a unit of its own, whoever's it is."""
        return Examples(self.features, self.labels, np.arange(len(self.labels), dtype=np.int64))

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> "Examples":
        """These examples, in this order; units are numbered anew from 0."""
        index = np.asarray(rows, dtype=np.intp)
        units = np.unique(self.units[index], return_inverse=True)[1]
        return Examples(
            features=self.features[index],
            labels=self.labels[index],
            units=units.astype(np.int64).reshape(-1),
        )


class Task(Protocol):
    """A clinical task: all that is known of what is learned.

    Attributes:
        name: As a study names it.
        schema: Its fields, with units and ranges.
        models: Names that `model` knows; the first is the default.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 (above)

    @property
    def schema(self) -> Schema: ...  # noqa: D102 (above)

    @property
    def models(self) -> tuple[str, ...]: ...  # noqa: D102 (above)

    def statistics(self, table: Table) -> Sums:
        """All that preparation may learn of a site's training rows: sums.

        They are exact, so they are for studies without privacy; under privacy prepare with None.
        """
        ...

    def fit(self, sums: Sums) -> Fitted:
        """Preparation from the sums of all sites. Raises `ValueError` on sums that cannot be."""
        ...

    def prepare(self, table: Table, fitted: Fitted | None) -> Examples:
        """Arrays for training. With None it uses the schema's public ranges: no budget spent."""
        ...

    def model(self, name: str, **args: Any) -> "nn.Module":
        """A new model with deterministic initial parameters. Raises `ConfigError`."""
        ...

    def loss(self, outputs: "Tensor", labels: "Tensor") -> "Tensor":
        """One value an example, shape `(num_examples,)`."""
        ...

    def probabilities(self, outputs: "Tensor") -> "Tensor":
        """What a clinician is shown, in [0, 1], shape `(num_examples,)` for a binary task."""
        ...

    def metrics(self, outputs: "Tensor", labels: "Tensor") -> Sums:
        """Counts that add up over sites, for `summarise`."""
        ...

    def summarise(self, sums: Sums) -> dict[str, float]:
        """Metrics of one site's or all sites' sums: `num_examples`, and what they allow."""
        ...

    def private_metrics(self, sums: Sums) -> Sums:
        """The part of `metrics` that noise is added to before it leaves a private study's site.

        Adding or removing one patient moves it, all arrays together, by at most 1 in L2 norm.
        """
        ...

    def summarise_private(self, sums: Sums) -> dict[str, float]:
        """As `summarise`, of `private_metrics` with noise on them."""
        ...

    def calibration(self, sums: Sums) -> dict[str, Any]:
        """Of `private_metrics`: `bins` with predicted and observed, and `ece`; JSON values."""
        ...

    def export_onnx(self, model: "nn.Module", fitted: Fitted | None) -> bytes:
        """An ONNX model from raw clinical values to probabilities, preparation inside.

        Input `input`, float32, shape `(N, number of features of the schema)`, in the schema's
        order and coding, NaN = missing. Output `probability`, float32, shape `(N, 1)`.

        Raises `ValueError` for a model that it cannot write, before anything is trained.
        """
        ...


def add_sums(sites: Iterable[Sums]) -> dict[str, NDArray[np.float64]]:
    """The sums of several sites together.

    Raises:
        ValueError: There are none, or they do not have the same arrays.
    """
    total: dict[str, NDArray[np.float64]] | None = None
    for sums in sites:
        if total is None:
            total = {name: np.array(values, dtype=np.float64) for name, values in sums.items()}
            continue
        shapes = {name: np.shape(values) for name, values in sums.items()}
        if shapes != {name: values.shape for name, values in total.items()}:
            raise ValueError(f"sums of different arrays: {sorted(total)} and {sorted(sums)}")
        for name, values in sums.items():
            total[name] += values
    if total is None:
        raise ValueError("no sums to add")
    return total
