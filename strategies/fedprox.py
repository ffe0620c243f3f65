"""Federated averaging of sites that are held near the global model."""

from dataclasses import dataclass

from fedward.strategies.fedavg import FedAvg


@dataclass(frozen=True, slots=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose sites add `proximal / 2 * |local - global|^2` to their loss.

    Li et al., MLSys 2020, Algorithm 2. The term is of parameters alone, so that it costs no
    privacy; in a round of one step it is zero, and this is FedAvg.

    Attributes:
        proximal: The paper's mu, >= 0.
    """

    proximal: float = 0.01

    def __post_init__(self) -> None:
        """Refuse a term that would push sites away."""
        FedAvg.__post_init__(self)  # `super()` does not know a class that was given slots
        if not self.proximal >= 0:
            raise ValueError("proximal must be 0 or more")
