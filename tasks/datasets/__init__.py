"""Public data sets that installed packages carry, by name, with their natural hospitals."""

import importlib
from functools import cache
from typing import Protocol, cast

import numpy as np

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


@cache
def pooled(dataset: str) -> Table:
    """All partitions of a data set as one table, in order; ids are "partition/id".

    Raises as `load`.
    """
    tables = {name: load(dataset, partition=name) for name in _find(dataset).PUBLIC_SIZES}
    first = next(iter(tables.values()))
    return Table(
        source=dataset,
        patient_ids=tuple(
            f"{name}/{patient_id}" for name, t in tables.items() for patient_id in t.patient_ids
        ),
        columns={
            column: np.concatenate([table.columns[column] for table in tables.values()])
            for column in first.columns
        },
    )


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
    if ":" in dataset:
        return _load_other(dataset)
    if dataset not in _MODULES:
        raise ConfigError(
            f'= "{dataset}" is not an embedded data set; allowed: {", ".join(_MODULES)}',
            file="site",
            key="[data] dataset",
        )
    return cast("_Dataset", importlib.import_module(_MODULES[dataset]))


def _load_other(dataset: str) -> _Dataset:
    """The data set "package.module:Attribute" of an installed package."""
    module_name, _, attribute = dataset.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'= "{dataset}" cannot be loaded: {error}; install its package',
            file="site",
            key="[data] dataset",
        ) from error
    return cast("_Dataset", found)
