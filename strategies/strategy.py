"""What a strategy is: a frozen value with pure methods over flat vectors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Needs = Literal["sum", "each"]


@dataclass(frozen=True, slots=True)
class State:
    """Where a strategy stands.

    Attributes:
        parameters: The global model, shape `(num_parameters,)`.
        total: Running sum of this round's weighted updates, float64, so that the order in which
            sites reply does not show in float32; None before the first.
        weight: Sum of this round's weights.
        memory: What lives on between rounds (momentum and the like), by name.
    """

    parameters: Vector
    total: NDArray[np.float64] | None = None
    weight: float = 0.0
    memory: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def folded(self, update: Vector, weight: float) -> "State":
        """Add `weight * update` to the running sum, in place of the old sum.

        Raises:
            ValueError: The update's shape is another, or its weight is not positive and finite.
        """
        if update.shape != self.parameters.shape:
            raise ValueError(f"update has shape {update.shape}, not {self.parameters.shape}")
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight {weight} is not positive and finite")
        total = np.zeros(update.shape) if self.total is None else self.total
        weighted = update.astype(np.float64)  # then multiplied: in half the time of one call
        weighted *= weight
        total += weighted
        return State(self.parameters, total, self.weight + weight, self.memory)


class Strategy(Protocol):
    """How updates become a model. Every one passes `tests/test_strategies_contract.py`."""

    @property
    def needs(self) -> Needs:
        """`sum` runs under secure aggregation; `each` must see single updates."""
        ...

    @property
    def proximal(self) -> float:
        """Weight of the proximal term that sites add to their loss; 0 for none."""
        ...

    def init(self, parameters: Vector) -> State:
        """The state before the first round."""
        ...

    def instructions(self, state: State) -> Mapping[str, float]:
        """What sites are told beside the parameters."""
        ...

    def fold(self, state: State, update: Vector, weight: float) -> State:
        """Take in one reply, as it comes."""
        ...

    def finish(self, state: State) -> State:
        """The next global parameters.

        Raises:
            ValueError: Nothing was folded.
        """
        ...
