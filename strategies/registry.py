"""Strategies by the name that a study gives."""

from collections.abc import Callable, Mapping

from fedward.core.errors import ConfigError
from fedward.core.simulated import Args
from fedward.strategies.fedavg import FedAvg
from fedward.strategies.fedprox import FedProx
from fedward.strategies.strategy import Strategy

STRATEGIES: Mapping[str, Callable[..., Strategy]] = {"fedavg": FedAvg, "fedprox": FedProx}


def make_strategy(name: str, args: Args, *, file: str = "study") -> Strategy:
    """Build the strategy that a study names.

    Raises:
        ConfigError: The name is unknown, or its arguments do not fit.
    """
    if name not in STRATEGIES:
        raise ConfigError(
            f'= "{name}" is not known; allowed: {", ".join(sorted(STRATEGIES))}',
            file=file,
            key="[strategy] name",
        )
    try:
        return STRATEGIES[name](**args)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error), file=file, key="[strategy.args]") from error
