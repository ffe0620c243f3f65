"""Federated averaging."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedward.strategies.strategy import Needs, State, Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvg:
    """Example-weighted mean of the sites' updates, added to the global model.

    McMahan et al., AISTATS 2017, Algorithm 1; with `server_learning_rate` other than 1 it is
    the server SGD of Reddi et al., ICLR 2021, Algorithm 1.

    Attributes:
        server_learning_rate: Step along the mean update, > 0.
    """

    server_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a step that is not positive."""
        if not self.server_learning_rate > 0:
            raise ValueError("server_learning_rate must be positive")

    @property
    def needs(self) -> Needs:
        """A weighted sum is enough."""
        return "sum"

    @property
    def proximal(self) -> float:
        """Sites are free to go where they like."""
        return 0.0

    def init(self, parameters: Vector) -> State:
        """Start from `parameters`."""
        return State(parameters=parameters.astype(np.float32, copy=True))

    def instructions(self, state: State) -> Mapping[str, float]:  # noqa: ARG002 (the protocol)
        """Sites need nothing beside the parameters."""
        return {}

    def fold(self, state: State, update: Vector, weight: float) -> State:
        """Add one weighted update to the running sum."""
        return state.folded(update, weight)

    def finish(self, state: State) -> State:
        """Move the global model by the weighted mean."""
        if state.total is None:
            raise ValueError("no update was folded")
        mean = state.total / state.weight
        moved = state.parameters.astype(np.float64) + self.server_learning_rate * mean
        return State(parameters=moved.astype(np.float32), memory=state.memory)
