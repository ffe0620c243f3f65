"""Draws for many sites at once: of each row what its source would give by itself."""

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from fedward.privacy.mechanisms.noise import NoiseSource, drawing, noise_step, release_steps
from fedward.privacy.mechanisms.sources import SimulatedSource
from fedward.privacy.mechanisms.streams import normal_rows, uniform_rows


def draw_uniform_rows(
    sources: Sequence[NoiseSource], sizes: NDArray[np.int64], *, with_noise: bool
) -> NDArray[np.float64]:
    """So many uniform numbers of each source, shape `(sources, largest size)`; then ones.

    Args:
        sources: One a row.
        sizes: Shape `(sources,)`.
        with_noise: Whether noise is drawn, too. Then it is worth while to compile.
    """
    drawn = np.ones((len(sources), int(sizes.max())))
    if with_noise and _simulated(sources):
        keys, used = _streams(sources)
        uniform_rows(keys, used, sizes, drawn)
        _advance(sources, used)
        return drawn
    for row, size, source in zip(drawn, sizes.tolist(), sources, strict=True):
        if isinstance(source, SimulatedSource):
            source.fill_uniform(row[:size])
        else:
            row[:size] = source.uniform(size)
    return drawn


def add_noise_to_rows(
    rows: NDArray[np.float32],
    *,
    stds: Sequence[float],
    sensitivities: Sequence[float],
    sources: Sequence[NoiseSource],
) -> NDArray[np.float32]:
    """Release each row with noise of its own: to the bit what `add_noise` gives for that row.

    For simulations, in which the rows are sites that live in one process.

    Args:
        rows: Shape `(sites, size)`, already clipped.
        stds: Standard deviation of the noise on each element, > 0, one a row.
        sensitivities: Of each row.
        sources: Where the noise of each row comes from.

    Raises:
        ValueError: As `add_noise`.
    """
    settings = list(zip(stds, sensitivities, strict=True))
    given = np.require(rows, requirements=("C", "A", "W"))
    released = np.empty(rows.shape, np.float32)
    drawn = np.empty(rows.shape, np.int32)
    if len(sources) != len(rows):
        raise ValueError(f"{len(sources)} sources are not one for each of {len(rows)} rows")
    _draw_steps(sources, drawn)
    # Most sites have the same settings; one call for all of them costs little more than for one.
    alike = len(set(settings)) == 1
    for (std, sensitivity), at in (
        [(settings[0], slice(None))] if alike else zip(settings, range(len(settings)), strict=True)
    ):
        step = noise_step(std, sensitivity=sensitivity, size=rows.shape[1])
        release_steps(given[at].reshape(-1), drawn[at].reshape(-1), step, released[at].reshape(-1))
    drawn.fill(0)
    return released


def _draw_steps(sources: Sequence[NoiseSource], out: NDArray[np.int32]) -> None:
    """Overwrite each row with one request of `drawing`."""
    if _simulated(sources):
        keys, used = _streams(sources)
        normal_rows(keys, used, out)
        _advance(sources, used)
        return
    for row, source in zip(out, sources, strict=True):
        with drawing(source, row.size) as draw:
            draw(row)


def _simulated(sources: Sequence[NoiseSource]) -> TypeGuard[Sequence[SimulatedSource]]:
    """Whether all are simulated, and each is there once: together they draw at the same time."""
    once = len({id(source) for source in sources}) == len(sources)
    return once and all(type(source) is SimulatedSource for source in sources)


def _streams(sources: Sequence[SimulatedSource]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    keys = np.array([source.key for source in sources], np.uint64)
    return keys.reshape(-1, 2), np.array([source.used for source in sources], np.int64)


def _advance(sources: Sequence[SimulatedSource], used: NDArray[np.int64]) -> None:
    for source, words in zip(sources, used.tolist(), strict=True):
        source.used = words
