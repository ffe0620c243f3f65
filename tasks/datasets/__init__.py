"""Public data sets that installed packages carry, by name, with their natural hospitals."""

import importlib
from typing import Protocol, cast

from fedward.core.errors import ConfigError
from fedward.tasks.task import Table

_MODULES = {"heart-disease": "fedward.tasks.datasets.heart_disease"}


class _Dataset(Protocol):
    PUBLIC_SIZES: dict[str, int]

    def load(self, partition: str) -> Table: ...


def names() -> tuple[str, ...]:
    """The data sets there are."""
    return tuple(_MODULES)


def partitions(dataset: str) -> dict[str, int]:
    """The natural partitions of a data set, each with its published number of patients.

    Raises:
        ConfigError: There is no such data set; the message lists those that there are.
    """
    return dict(_find(dataset).PUBLIC_SIZES)


def load(dataset: str, *, partition: str) -> Table:
    """One partition of a data set, validated.

    Raises:
        ConfigError: There is no such data set or partition; the message lists those there are.
        DataError: Its file is missing or not the one that was checked.
    """
    module = _find(dataset)
    if partition not in module.PUBLIC_SIZES:
        raise ConfigError(
            f'= "{partition}" is not a partition of {dataset}; '
            f"allowed: {', '.join(module.PUBLIC_SIZES)}",
            file="site",
            key="[data] partition",
        )
    return module.load(partition)


def _find(dataset: str) -> _Dataset:
    if dataset not in _MODULES:
        raise ConfigError(
            f'= "{dataset}" is not an embedded data set; allowed: {", ".join(_MODULES)}',
            file="site",
            key="[data] dataset",
        )
    return cast("_Dataset", importlib.import_module(_MODULES[dataset]))
