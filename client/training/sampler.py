"""True Poisson sampling over patients, from the one source of randomness."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedward.privacy.mechanisms.noise import NoiseSource


@dataclass(frozen=True, slots=True)
class Batch:
    """The records of the patients that take part in a step.

    The records of one patient stand together, `records` rows a patient; what is missing of
    them is filled with copies whose `mask` is zero.

    Attributes:
        features: Shape `(patients * records, ...)`.
        labels: Shape `(patients * records, ...)`.
        mask: Shape `(patients * records,)`, 0 or 1; None where every row counts.
        records: Rows of one patient.
    """

    features: Tensor
    labels: Tensor
    mask: Tensor | None
    records: int

    @property
    def patients(self) -> int:
        """Number of patients."""
        return self.features.shape[0] // self.records

    def part(self, start: int, stop: int) -> "Batch":
        """Patients `start` to `stop`, as views."""
        rows = slice(start * self.records, stop * self.records)
        return Batch(
            self.features[rows],
            self.labels[rows],
            None if self.mask is None else self.mask[rows],
            self.records,
        )

    def without(self, bad: Tensor) -> "Batch":
        """The batch where the rows that `bad` names count for nothing."""
        if self.records == 1:
            return self.only(~bad)
        features = self.features.clone()
        features[bad] = 0
        mask = features.new_ones(len(bad), dtype=torch.float32) if self.mask is None else self.mask
        return Batch(features, self.labels, mask.masked_fill(bad, 0.0), self.records)

    def only(self, patients: Tensor) -> "Batch":
        """Those patients that the mask `patients` names."""
        rows = patients.repeat_interleave(self.records)
        mask = None if self.mask is None else self.mask[rows]
        return Batch(self.features[rows], self.labels[rows], mask, self.records)

    def one_by_one(self) -> "Batch":
        """Every row as a patient of its own."""
        return Batch(self.features, self.labels, self.mask, 1)


class PoissonSampler:
    """Each patient is in a step with probability `sample_rate`, independently of all else.

    Nothing is shuffled, padded to a size or drawn again when empty: the accountant's
    amplification by sampling (Balle et al. 2018) holds for exactly this.

    Args:
        features: Shape `(num_records, ...)`.
        labels: Shape `(num_records, ...)`.
        units: Shape `(num_records,)`: which patient, 0 to num_patients - 1, a record is of.
        sample_rate: In (0, 1].
        max_records: Rows of one patient in a step, at most.
        device: Where batches are to be.
    """

    def __init__(
        self,
        features: NDArray[np.generic],
        labels: NDArray[np.generic],
        units: NDArray[np.int64],
        *,
        sample_rate: float,
        max_records: int,
        device: torch.device,
    ) -> None:
        if not len(features) == len(labels) == len(units):
            raise ValueError(
                f"features, labels and units are of one length, not {len(features)}, "
                f"{len(labels)} and {len(units)}"
            )
        self._features = _tensor(features).to(device)
        self._labels = _tensor(labels).to(device)
        # Where they are arrays they stay ones: NumPy's call costs a third of torch's.
        self._arrays = (
            (self._features.numpy(), self._labels.numpy()) if self._features.is_cpu else None
        )
        self._rate = sample_rate
        self.num_units = int(units.max()) + 1 if len(units) else 0
        self._single = bool(np.array_equal(units, np.arange(len(units))))
        self.records = 1
        if not self._single:
            if len(units) and units.min() < 0:
                raise ValueError("units are numbered from 0")
            self._order = np.argsort(units, kind="stable")
            self._counts = np.bincount(units, minlength=self.num_units)
            self._starts = np.concatenate([[0], np.cumsum(self._counts)[:-1]])
            self.records = int(min(max_records, self._counts.max(initial=1)))
            self._choose = bool(self._counts.max(initial=0) > max_records)

    def first(self) -> Batch:
        """The first record as often as a patient has rows: a batch of the right shape."""
        features, labels = self._features[:1], self._labels[:1]
        if self.records > 1:
            features = features.repeat_interleave(self.records, 0)
        return Batch(features, labels, None, self.records)

    def choose(self, noise: NoiseSource) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Which rows the next step takes; nobody at all is an answer like any other.

        Returns:
            Row numbers, shape `(patients * records,)`, patient by patient, and which of them
            count; None where all do.
        """
        chosen = np.flatnonzero(noise.uniform(self.num_units) < self._rate)
        if self._single:
            return chosen, None
        order = self._order
        if self._choose:
            # One draw a record, whoever is chosen: the number of draws tells nothing.
            priority = noise.uniform(len(order))
            units = np.repeat(np.arange(self.num_units), self._counts)
            order = order[np.lexsort((priority, units))]
        counts = np.minimum(self._counts[chosen], self.records)
        column = np.arange(self.records)
        present = column < counts[:, None]
        # A patient without records (counts 0) would read a neighbour's row: mask 0, row 0.
        position = self._starts[chosen][:, None] + np.where(present, column, 0)
        return order[np.minimum(position, len(order) - 1)].ravel(), present.ravel()

    @property
    def certain(self) -> bool:
        """Whether every step takes every row, one a patient, whatever is drawn."""
        return self._rate == 1 and self.records == 1 and (self._single or not self._choose)

    def everyone(self) -> NDArray[np.int64]:
        """What `choose` gives where it is `certain`, without a draw."""
        return np.arange(self.num_units) if self._single else self._order

    def draw(self, noise: NoiseSource) -> Batch:
        """The records of those who take part in the next step."""
        chosen, present = self.choose(noise)
        mask = None
        if present is not None:
            mask = torch.from_numpy(present.astype(np.float32)).to(self._features.device)
        if self._arrays is not None:
            features = torch.from_numpy(self._arrays[0].take(chosen, 0))
            labels = torch.from_numpy(self._arrays[1].take(chosen, 0))
        else:
            rows = torch.from_numpy(chosen).to(self._features.device)
            features = self._features.index_select(0, rows)
            labels = self._labels.index_select(0, rows)
        return Batch(features, labels, mask, self.records)


def _tensor(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
