"""A partition's data card: how large each site is, and how its classes are balanced."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedward.simulations.partitions.partition import Partition
from fedward.simulations.partitions.picture import sites_by_class
from fedward.tasks.task import Table

_DRAWN = 60


def data_card(partition: Partition, table: Table, *, label: str) -> dict[str, Any]:
    """A partition as JSON values.

    Returns:
        `sites`: by name, `patients` and `labels`, the number of each class; `overlap`: the mean
        number of sites that a patient who is anywhere is at.
    """
    labels = table.columns[label]
    classes = np.unique(labels)
    sites = {
        name: {
            "patients": len(rows),
            "labels": {f"{c:g}": int((labels[rows] == c).sum()) for c in classes},
        }
        for name, rows in partition.rows.items()
    }
    everywhere = np.concatenate(list(partition.rows.values()))
    return {
        "partition": partition.kind,
        "args": dict(partition.args),
        "dataset": table.source,
        "patients": len(table),
        "label": label,
        "overlap": round(len(everywhere) / max(1, len(np.unique(everywhere))), 3),
        "sites": sites,
    }


def draw_card(card: Mapping[str, Any]) -> str:
    """Sizes and classes of the sites as an SVG picture; of many sites, an even choice."""
    names = list(card["sites"])
    if len(names) > _DRAWN:
        names = [names[i] for i in np.linspace(0, len(names) - 1, _DRAWN).astype(int)]
    counts = {name: card["sites"][name]["labels"] for name in names}
    return sites_by_class(counts, label=card["label"])
