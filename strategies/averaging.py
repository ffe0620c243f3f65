"""The mean of the later iterates, which is post-processing and costs no privacy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedward.strategies.strategy import Vector


@dataclass(frozen=True, slots=True)
class IterateAverage:
    """Running mean of the global model over the last rounds (Polyak and Juditsky 1992).

    Noise of private rounds is independent, so the mean of k late iterates of a model that has
    settled carries much less of it than the last iterate.

    Attributes:
        first_round: The first round whose model counts.
        mean: Mean so far, float64; None before `first_round`.
        count: How many models it is a mean of.
    """

    first_round: int
    mean: NDArray[np.float64] | None = None
    count: int = 0

    @classmethod
    def over_last(cls, share: float, *, rounds: int) -> "IterateAverage":
        """Average the last `share` of `rounds`; 0 means the last model alone."""
        return cls(first_round=min(rounds, int(rounds * (1 - share)) + 1))

    def add(self, parameters: Vector, *, round_number: int) -> "IterateAverage":
        """Take in the model after `round_number`."""
        if round_number < self.first_round:
            return self
        if self.mean is None:
            return IterateAverage(self.first_round, parameters.astype(np.float64), 1)
        mean = self.mean + (parameters - self.mean) / (self.count + 1)
        return IterateAverage(self.first_round, mean, self.count + 1)

    def released(self, parameters: Vector) -> Vector:
        """The model to publish: the mean, or `parameters` where there is none yet."""
        return parameters if self.mean is None else self.mean.astype(np.float32)
