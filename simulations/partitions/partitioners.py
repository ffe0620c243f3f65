"""How sites differ: each partitioner is one way that hospitals are unlike each other.

Every one takes a `Source` and keyword arguments, which are those of `[simulation.args]`:

- `num_sites`: how many sites.
- `size`: patients of each; 0 shares out the data set once. With more than there are, sites are
  drawn from the data set as from a population, so that a patient may be at several sites (and on
  the same side of every site's held-out split).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedward.tasks.task import Table

Rows = NDArray[np.int64]
_FEWEST = 4  # patients of a site: some to train on and some to hold out


@dataclass(frozen=True, slots=True)
class Source:
    """What is spread.

    Attributes:
        table: The pooled data set.
        labels: Shape `(num_rows,)`: class of each row; NaN is not allowed.
        rng: Where chance comes from.
    """

    table: Table
    labels: NDArray[np.float64]
    rng: np.random.Generator


def natural(source: Source) -> Mapping[str, Rows]:
    """The hospitals of the data set, as they are."""
    hospitals = [patient_id.partition("/")[0] for patient_id in source.table.patient_ids]
    names = list(dict.fromkeys(hospitals))
    members = np.array(hospitals)
    return {name: np.flatnonzero(members == name).astype(np.int64) for name in names}


def dirichlet(
    source: Source, *, num_sites: int, alpha: float = 0.5, size: int = 0
) -> Mapping[str, Rows]:
    """Label skew: each site's mix of classes is drawn from a Dirichlet distribution.

    Hsu, Qi and Brown 2019: concentration `alpha` times the overall mix; small is skewed, large is
    even. Where a class is used up, the site takes others.
    """
    _positive("alpha", alpha)
    size, again = _size(source, num_sites, size)
    classes, of_row = np.unique(source.labels, return_inverse=True)
    prior = np.bincount(of_row) / len(of_row)
    left = [source.rng.permutation(np.flatnonzero(of_row == c)) for c in range(len(classes))]
    sites = []
    for _ in range(num_sites):
        mix = source.rng.dirichlet(np.maximum(alpha * prior, 1e-6))
        wanted = source.rng.multinomial(size, mix)
        wanted = _within(wanted, np.array([len(rows) for rows in left]))
        if again:
            parts = [
                source.rng.choice(rows, number, replace=False)
                for rows, number in zip(left, wanted, strict=True)
            ]
        else:
            parts = [rows[:number] for rows, number in zip(left, wanted, strict=True)]
            left = [rows[number:] for rows, number in zip(left, wanted, strict=True)]
        sites.append(np.concatenate(parts))
    return _named(sites)


def quantity(
    source: Source, *, num_sites: int, alpha: float = 1.0, size: int = 0
) -> Mapping[str, Rows]:
    """Quantity skew: shares of the patients are drawn from a Dirichlet distribution.

    Li, Diao, Chen and He 2022, section 4.3. Small `alpha` leaves a few large sites and many small
    ones; no site has fewer than four patients. `size` is then the mean.
    """
    _positive("alpha", alpha)
    size, again = _size(source, num_sites, size)
    rows = len(source.labels)
    total = size * num_sites
    shares = source.rng.dirichlet(np.full(num_sites, alpha))
    sizes = _FEWEST + np.floor(shares * (total - _FEWEST * num_sites)).astype(np.int64)
    sizes = np.minimum(sizes, rows)
    if again:
        return _named([source.rng.choice(rows, number, replace=False) for number in sizes])
    order = source.rng.permutation(rows)
    return _named(np.split(order[: sizes.sum()], np.cumsum(sizes)[:-1]))


def covariate(
    source: Source, *, num_sites: int, field: str, strength: float = 0.8, size: int = 0
) -> Mapping[str, Rows]:
    """Covariate shift: sites differ in a field, such as age; outcomes follow as they do.

    Args:
        source: What is spread.
        num_sites: How many sites.
        field: The field by which patients are sorted.
        strength: From 0, none, to 1, where sites take consecutive slices of the field.
        size: See above.
    """
    if field not in source.table.columns:
        raise ValueError(f'field = "{field}" is not a field; allowed: {_fields(source)}')
    values = source.table.columns[field]
    # Missing values are spread like any others.
    values = np.where(np.isnan(values), source.rng.permutation(values), values)
    return _sorted(
        source, np.nan_to_num(values, nan=np.nanmedian(values)), num_sites, strength, size
    )


def temporal(
    source: Source, *, num_sites: int, field: str = "", strength: float = 0.8, size: int = 0
) -> Mapping[str, Rows]:
    """Temporal drift: sites come from consecutive eras.

    Args:
        source: What is spread.
        num_sites: How many sites; the first has the oldest patients.
        field: The field that holds the time; without it, the order of the data set's rows.
        strength: From 0, none, to 1, where eras do not overlap.
        size: See above.
    """
    if field and field not in source.table.columns:
        raise ValueError(f'field = "{field}" is not a field; allowed: {_fields(source)}')
    rows = len(source.labels)
    time = source.table.columns[field] if field else np.arange(rows, dtype=np.float64)
    return _sorted(source, np.nan_to_num(time, nan=np.nanmedian(time)), num_sites, strength, size)


PARTITIONERS: Mapping[str, Callable[..., Mapping[str, Rows]]] = {
    "natural": natural,
    "dirichlet": dirichlet,
    "quantity": quantity,
    "covariate": covariate,
    "temporal": temporal,
}


def _sorted(
    source: Source, values: NDArray[np.float64], num_sites: int, strength: float, size: int
) -> Mapping[str, Rows]:
    """Sites along a line of ranks, blurred by what `strength` leaves to chance."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is from 0 to 1, not {strength}")
    given = size
    size, again = _size(source, num_sites, size)
    rows = len(values)
    ranks = np.empty(rows)
    ranks[np.lexsort((source.rng.random(rows), values))] = (np.arange(rows) + 0.5) / rows
    if not again:
        blurred = strength * ranks + (1 - strength) * source.rng.random(rows)
        order = np.argsort(blurred, kind="stable")[: given * num_sites or rows]
        return _named(np.array_split(order, num_sites))
    sites = []
    for number in range(num_sites):
        centre = (number + 0.5) / num_sites
        distance = strength * np.abs(ranks - centre) + (1 - strength) * source.rng.random(rows)
        sites.append(np.argpartition(distance, size - 1)[:size])
    return _named(sites)


def _size(source: Source, num_sites: int, size: int) -> tuple[int, bool]:
    """Patients a site, and whether there are too few for each to be at one site only."""
    rows = len(source.labels)
    if num_sites < 1:
        raise ValueError(f"num_sites is 1 or more, not {num_sites}")
    if np.isnan(source.labels).any():
        raise ValueError("a patient has no label; leave out unlabelled patients first")
    wanted = size or rows // num_sites
    if not _FEWEST <= wanted <= rows:
        raise ValueError(
            f"{num_sites} sites would have {wanted} of {rows} patients each; give size from "
            f"{_FEWEST} to {rows} (patients may then be at several sites)"
        )
    return wanted, wanted * num_sites > rows


def _within(wanted: NDArray[np.int64], left: NDArray[np.int64]) -> NDArray[np.int64]:
    """As many in all, but of no class more than are left."""
    taken = np.minimum(wanted, left)
    lacking = int(wanted.sum() - taken.sum())
    for c in np.argsort(-(left - taken)):
        more = min(lacking, int(left[c] - taken[c]))
        taken[c] += more
        lacking -= more
    return taken


def _named(sites: list[NDArray[np.int64]]) -> Mapping[str, Rows]:
    width = max(2, len(str(len(sites))))
    return {
        f"site-{number:0{width}d}": np.sort(rows).astype(np.int64)
        for number, rows in enumerate(sites, start=1)
    }


def _fields(source: Source) -> str:
    return ", ".join(source.table.columns)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, not {value}")
