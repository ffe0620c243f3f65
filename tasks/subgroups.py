"""Subgroups of patients, by public lines: metrics of each add up over sites as all others do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.errors import ConfigError
from fedward.tasks.schema import Schema
from fedward.tasks.task import Sums


@dataclass(frozen=True, slots=True)
class Grouping:
    """How one field divides patients. Whose value is missing is in no group.

    Attributes:
        field: The field.
        labels: Of the groups.
        cuts: Rising; of a number, the least value of each group but the first. Empty: the value
            is the group's number.
    """

    field: str
    labels: tuple[str, ...]
    cuts: tuple[float, ...] = ()

    def members(self, values: NDArray[np.floating[Any]]) -> list[NDArray[np.bool_]]:
        """Of each group, who is in it, shape `(num_rows,)`."""
        known = ~np.isnan(values)
        codes = np.digitize(values, self.cuts) if self.cuts else np.nan_to_num(values)
        return [known & (codes == number) for number in range(len(self.labels))]


def groupings(schema: Schema, asked: Mapping[str, Sequence[float]]) -> tuple[Grouping, ...]:
    """What `[evaluation] subgroups` asks for.

    Raises:
        ConfigError: A field is no feature, a number has no cuts or a category has some.
    """
    found = []
    for name, cuts in asked.items():
        key = f"[evaluation] subgroups.{name}"
        field = next((f for f in schema.features if f.name == name), None)
        if field is None:
            known = ", ".join(f.name for f in schema.features)
            raise ConfigError(f"is no field; there are {known}", file="study", key=key)
        if (field.kind == "number") != bool(cuts) or list(cuts) != sorted(set(cuts)):
            raise ConfigError(
                "takes rising cuts for a number, such as [50, 65], and [] for anything else",
                file="study",
                key=key,
            )
        match field.kind:
            case "category":
                labels = field.categories
            case "flag":
                labels = ("no", "yes")
            case "number":
                ends = [f"under {cuts[0]:g}"]
                ends += [f"{a:g} to under {b:g}" for a, b in pairwise(cuts)]
                labels = (*ends, f"{cuts[-1]:g} and over")
        found.append(Grouping(name, tuple(labels), tuple(cuts)))
    return tuple(found)


def with_groups(everybody: Sums, groups: Mapping[tuple[str, int], Sums]) -> dict[str, Any]:
    """One set of sums: everybody's, and those of each group by field and number."""
    named = {
        f"{field}.{number}.{name}": array
        for (field, number), sums in groups.items()
        for name, array in sums.items()
    }
    return {**everybody, **named}


def of_group(sums: Sums, field: str, number: int) -> dict[str, NDArray[np.float64]]:
    """A group's part of `with_groups`."""
    start = f"{field}.{number}."
    return {name.removeprefix(start): a for name, a in sums.items() if name.startswith(start)}


def of_everybody(sums: Sums) -> dict[str, NDArray[np.float64]]:
    """Everybody's part of `with_groups`."""
    return {name: array for name, array in sums.items() if "." not in name}
