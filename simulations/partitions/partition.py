"""From a study's `[simulation]` to which patients each simulated site has."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from fedward.core.errors import ConfigError
from fedward.core.simulated import Args
from fedward.simulations.partitions import partitioners
from fedward.tasks.task import Table

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Partition:
    """Which patients of a pooled data set each simulated site has.

    Attributes:
        kind: The partitioner's name.
        args: What it was given, defaults included.
        rows: By site, row numbers of the pooled table; no row twice at one site. Where the sites
            together ask for more than there are, patients are at several sites.
    """

    kind: str
    args: Args
    rows: Mapping[str, Rows]


def make_partition(table: Table, *, label: str, kind: str, args: Args, seed: int) -> Partition:
    """Spread the patients of `table` over simulated sites.

    Args:
        table: The pooled data set; ids begin with the hospital's name.
        label: The column that says which class a patient is of.
        kind: natural, dirichlet, quantity, covariate or temporal.
        args: `[simulation.args]`; see `partitioners`.
        seed: Of the study: the same seed gives the same sites.

    Raises:
        ConfigError: The partitioner is not known, or its arguments do not fit the data.
    """
    make = partitioners.PARTITIONERS.get(kind)
    if make is None:
        raise ConfigError(
            f'= "{kind}" is not known; allowed: {", ".join(partitioners.PARTITIONERS)}',
            file="study",
            key="[simulation] partition",
        )
    parameters = inspect.signature(make).parameters
    known = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in args:
        if name not in known:
            raise ConfigError(
                f"is not an argument of {kind}; allowed: {', '.join(known) or 'none'}",
                file="study",
                key=f"[simulation.args] {name}",
            )
    given = {name: args.get(name, default) for name, default in known.items()}
    if any(value is inspect.Parameter.empty for value in given.values()):
        raise ConfigError(f"needs num_sites for {kind}", file="study", key="[simulation.args]")
    rng = np.random.default_rng([seed, 0x9A27])
    source = partitioners.Source(table=table, labels=table.columns[label], rng=rng)
    try:
        rows = make(source, **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), file="study", key="[simulation.args]") from error
    return Partition(kind, given, rows)


def write_rows(partition: Partition, file: Path) -> None:
    """Keep a partition's rows, by site, as safetensors. Not flushed: it can be made again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(save(dict(partition.rows)))


def read_rows(file: Path) -> dict[str, Rows]:
    """Read what `write_rows` wrote."""
    rows: dict[str, Rows] = load_file(file)
    return rows
